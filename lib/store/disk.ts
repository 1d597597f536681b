import fs from 'node:fs';
import { KvmError, systemError } from '../errors.ts';
import { ERRNO, type ErrnoName, errnoName, HUGETLBFS_MAGIC } from '../uapi.ts';

/** What the store does with files: node:fs, or a test that fails on purpose. */
export type FileSystem = Pick<
  typeof fs,
  | 'openSync'
  | 'writeSync'
  | 'ftruncateSync'
  | 'fsyncSync'
  | 'closeSync'
  | 'mkdirSync'
  | 'readSync'
  | 'renameSync'
  | 'rmSync'
  | 'readdirSync'
  | 'fstatSync'
  | 'linkSync'
  | 'readFileSync'
  | 'symlinkSync'
  | 'readlinkSync'
>;

export function corrupt(message: string): KvmError {
  return new KvmError({ code: 'ERR_CORRUPT', message });
}

const reasons: Readonly<Record<string, string>> = {
  ENOSPC: 'the file system is full; nothing that was stored has changed',
  EDQUOT: 'the disk quota is used up; nothing that was stored has changed',
  EACCES: 'no permission',
  EPERM: 'no permission',
  EROFS: 'the file system is read-only',
  ENOENT: 'it does not exist',
  EEXIST: 'it exists already',
  ENOTEMPTY: 'it exists already',
  ENOTDIR: 'it is not a folder',
  EFBIG: 'the file system has no files that large',
  EINVAL: 'the file system cannot do that',
  EIO: 'the disk could not read or write it',
};

/** Why a call on a file fails, where its errno says it. */
export function fileReason(errno: number): string | null {
  return reasons[errnoName(errno)] ?? null;
}

/** What node:fs threw, as an error of this library; others are passed on. */
export function fileError(error: unknown, path: string): unknown {
  const { code, syscall } = error as NodeJS.ErrnoException;
  if (error instanceof KvmError || typeof code !== 'string' || !syscall) return error;
  const errno = -(ERRNO[code as ErrnoName] ?? ERRNO.EIO);
  return systemError(errno, { syscall, args: { path } }, `${path}: ${reasons[code] ?? (error as Error).message}`);
}

/** Whole files. */
export class Disk {
  readonly fs: FileSystem;

  constructor(files: FileSystem = fs) {
    this.fs = files;
  }

  /** Runs file calls on a path; what they throw is a KvmError. */
  on<T>(path: string, run: () => T): T {
    try {
      return run();
    } catch (error) {
      throw fileError(error, path);
    }
  }

  read(path: string, largest: number): Uint8Array {
    const fd = this.fs.openSync(path, 'r');
    try {
      const { size } = this.fs.fstatSync(fd);
      if (size > largest) throw corrupt(`${path} has ${size} bytes: too large to be what it should be`);
      const bytes = new Uint8Array(size);
      let done = 0;
      while (done < size) {
        const count = this.fs.readSync(fd, bytes, done, size - done, done);
        if (count === 0) break;
        done += count;
      }
      return bytes.subarray(0, done);
    } finally {
      this.fs.closeSync(fd);
    }
  }

  /** Makes a file exactly these bytes, and waits until the disk has them. */
  write(path: string, bytes: Uint8Array): void {
    this.on(path, () => {
      const fd = this.fs.openSync(path, fs.constants.O_WRONLY | fs.constants.O_CREAT, 0o600);
      try {
        for (let done = 0; done < bytes.length; ) done += this.fs.writeSync(fd, bytes, done, bytes.length - done, done);
        this.fs.ftruncateSync(fd, bytes.length);
        this.fs.fsyncSync(fd);
      } finally {
        this.fs.closeSync(fd);
      }
    });
  }

  /** Bytes of a page of a file in this folder, if it is on hugetlbfs, which has no write(2). */
  hugePageSizeOf(path: string): number | null {
    const { type, bsize } = fs.statfsSync(path);
    return type === HUGETLBFS_MAGIC ? bsize : null;
  }

  /** Waits until a folder's names are on the disk, where folders can be synced. */
  syncFolder(path: string): void {
    if (process.platform === 'win32') return;
    const fd = this.fs.openSync(path, 'r');
    try {
      this.fs.fsyncSync(fd);
    } catch (error) {
      // Some file systems know no sync of a folder.
      if ((error as NodeJS.ErrnoException).code !== 'EINVAL') throw error;
    } finally {
      this.fs.closeSync(fd);
    }
  }
}
