import fs from 'node:fs';
import { ERRNO, type ErrnoName, O_CREAT, O_RDWR, O_WRONLY } from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import { MemoryFile } from './memory_file.ts';

const CHUNK = 1 << 20;

/** A real file of the host seen through the software kernel's page cache: read when opened, written back when synced and closed. */
export class DiskFile extends MemoryFile {
  readonly #fd: number;
  readonly #writable: boolean;

  /** @returns the file, or -errno. */
  static open(pageSize: number, path: string, flags: number, mode: number): DiskFile | Result {
    const access = flags & (O_RDWR | O_WRONLY);
    const { O_RDONLY, O_RDWR: readWrite, O_CREAT: create } = fs.constants;
    return attempt(() => {
      const fd = fs.openSync(path, (access ? readWrite : O_RDONLY) | (flags & O_CREAT ? create : 0), mode);
      try {
        return new DiskFile(pageSize, fd, access !== 0);
      } catch (error) {
        fs.closeSync(fd);
        throw error;
      }
    });
  }

  private constructor(pageSize: number, fd: number, writable: boolean) {
    const status = fs.fstatSync(fd);
    super(pageSize, BigInt(status.ino), { mode: status.mode });
    this.#fd = fd;
    this.#writable = writable;
    this.size = status.size;
    // A file without blocks is one hole, however large.
    if (status.blocks !== 0) this.#load();
  }

  override truncate(size: number): Result {
    if (!this.#writable) return -ERRNO.EINVAL;
    return attempt(() => fs.ftruncateSync(this.#fd, size) ?? 0) || super.truncate(size);
  }

  override sync(): Result {
    return this.#writable ? attempt(() => this.#writeBack()) : 0;
  }

  #writeBack(): Result {
    const { pageSize } = this.store;
    const buffer = new Uint8Array(CHUNK);
    for (const { start, end } of this.store.presentWithin(0, this.pages)) {
      for (let at = start * pageSize; at < Math.min(end * pageSize, this.size); at += CHUNK) {
        const chunk = buffer.subarray(0, Math.min(CHUNK, end * pageSize - at, this.size - at));
        this.store.read(at, chunk);
        fs.writeSync(this.#fd, chunk, 0, chunk.length, at);
      }
    }
    return 0;
  }

  protected override released(): void {
    super.released();
    if (this.sync() < 0)
      process.emitWarning('a file behind host memory could not be written back', { code: 'GUEST_MEMFD_WRITEBACK' });
    fs.closeSync(this.#fd);
  }

  #load(): void {
    const { pageSize } = this.store;
    const buffer = new Uint8Array(CHUNK);
    for (let at = 0; at < this.size; at += CHUNK) {
      const length = fs.readSync(this.#fd, buffer, 0, CHUNK, at);
      for (let page = 0; page < length; page += pageSize) {
        const bytes = buffer.subarray(page, Math.min(page + pageSize, length));
        if (bytes.some((byte) => byte !== 0)) this.store.write(at + page, bytes);
      }
    }
  }
}

function attempt<T>(call: () => T): T | Result {
  try {
    return call();
  } catch (error) {
    return -(ERRNO[(error as NodeJS.ErrnoException).code as ErrnoName] ?? ERRNO.EIO);
  }
}
