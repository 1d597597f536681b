import fs from 'node:fs';
import { ERRNO, type ErrnoName, HUGETLBFS_MAGIC, O_CREAT, O_RDWR, O_WRONLY, TMPFS_MAGIC } from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import { HostFile } from './host_file.ts';
import { MemoryFile } from './memory_file.ts';

/**
 * A real file of the host. What is written by a call or by a guest is in it at once, so that it outlives a process that is killed; what is
 * written through a window when the file is synced or closed.
 */
export class DiskFile extends MemoryFile {
  readonly #host: HostFile;
  readonly #writable: boolean;

  /** @returns the file, or -errno. */
  static open(pageSize: number, path: string, flags: number, mode: number): DiskFile | Result {
    const access = flags & (O_RDWR | O_WRONLY);
    const { O_RDONLY, O_RDWR: readWrite, O_CREAT: create } = fs.constants;
    return attempt(() => {
      const fd = fs.openSync(path, (access ? readWrite : O_RDONLY) | (flags & O_CREAT ? create : 0), mode);
      try {
        // There is no write(2) there, and what the model knows of a page is written.
        const { type } = fs.statfsSync(path);
        if (type === HUGETLBFS_MAGIC) {
          fs.closeSync(fd);
          return -ERRNO.EOPNOTSUPP;
        }
        return new DiskFile(
          pageSize,
          new HostFile(fd, access !== 0),
          fs.fstatSync(fd),
          access !== 0,
          type === TMPFS_MAGIC,
        );
      } catch (error) {
        fs.closeSync(fd);
        throw error;
      }
    });
  }

  private constructor(pageSize: number, host: HostFile, status: fs.Stats, writable: boolean, shmem: boolean) {
    super(pageSize, BigInt(status.ino), { mode: status.mode, disk: host, shmem });
    this.#host = host;
    this.#writable = writable;
    this.size = host.size = status.size;
    // A file without blocks is one hole, however large.
    if (status.blocks === 0) return;
    for (const { start, end } of host.dataWithin(0, this.size))
      this.store.touch(Math.floor(start / pageSize), Math.ceil(end / pageSize));
  }

  override write(source: Uint8Array, offset: number): Result {
    this.#host.size = Math.max(this.#host.size, offset + source.length);
    return super.write(source, offset);
  }

  override truncate(size: number): Result {
    if (!this.#writable) return -ERRNO.EINVAL;
    const result = attempt(() => this.#host.truncate(size) ?? 0);
    return result || super.truncate(size);
  }

  override allocate(offset: bigint, length: bigint, keepSize: boolean): Result {
    const result = attempt(() => this.#host.allocate(Number(offset), Number(length), keepSize));
    return result || super.allocate(offset, length, keepSize);
  }

  override sync(): Result {
    return this.#writable ? attempt(() => (this.store.writeBack() ? (this.#host.sync() ?? 0) : -ERRNO.ENOSPC)) : 0;
  }

  protected override released(): void {
    super.released();
    if (this.#writable && !this.store.writeBack())
      process.emitWarning('a file behind host memory could not be written back', { code: 'GUEST_MEMFD_WRITEBACK' });
    this.#host.close();
  }
}

function attempt<T>(call: () => T): T | Result {
  try {
    return call();
  } catch (error) {
    return -(ERRNO[(error as NodeJS.ErrnoException).code as ErrnoName] ?? ERRNO.EIO);
  }
}
