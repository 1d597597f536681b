import fs from 'node:fs';
import { FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, O_CLOEXEC, O_RDONLY, O_RDWR } from '../../uapi.ts';
import { dataExtents } from '../data_extents.ts';
import { type LinuxKernel, linuxKernel } from '../linux/linux_kernel.ts';
import type { Disk } from './page_store.ts';

const CHUNK = 1 << 20;

/**
 * A file of the host by node:fs; its holes by the addon, where there is one. Without, a file has no hole but the one behind the last byte that
 * was ever written.
 */
export class HostFile implements Disk {
  /** Bytes; a write never goes past it. */
  size = 0;
  readonly #fd: number;
  readonly #holes: { readonly kernel: LinuxKernel; readonly fd: number } | null;

  constructor(fd: number, writable: boolean) {
    this.#fd = fd;
    this.#holes = openAgain(fd, writable);
  }

  read(offset: number, target: Uint8Array): void {
    let done = 0;
    while (done < target.length) {
      const count = fs.readSync(this.#fd, target, done, target.length - done, offset + done);
      if (count === 0) break;
      done += count;
    }
    target.fill(0, done);
  }

  write(offset: number, source: Uint8Array): boolean {
    const length = Math.min(source.length, this.size - offset);
    try {
      for (let done = 0; done < length; ) done += fs.writeSync(this.#fd, source, done, length - done, offset + done);
      return true;
    } catch {
      return false;
    }
  }

  zero(offset: number, end: number): void {
    const stop = Math.min(end, this.size);
    if (offset >= stop) return;
    const mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (this.#holes && this.#holes.kernel.fallocate(this.#holes.fd, mode, offset, stop - offset) === 0) return;
    const buffer = new Uint8Array(CHUNK);
    for (let at = offset; at < stop; at += CHUNK) {
      const chunk = buffer.subarray(0, Math.min(CHUNK, stop - at));
      this.read(at, chunk);
      if (chunk.some((byte) => byte !== 0)) this.write(at, chunk.fill(0));
    }
  }

  *dataWithin(offset: number, end: number): Generator<{ readonly start: number; readonly end: number }> {
    const stop = Math.min(end, this.size);
    if (!this.#holes) {
      if (offset < stop) yield { start: offset, end: stop };
      return;
    }
    yield* dataExtents(this.#holes.kernel, this.#holes.fd, offset, stop);
  }

  truncate(size: number): void {
    fs.ftruncateSync(this.#fd, size);
    this.size = size;
  }

  /** Blocks for the range, where the addon can ask for them; 0 or -errno. */
  allocate(offset: number, length: number, keepSize: boolean): number {
    const result = this.#holes?.kernel.fallocate(this.#holes.fd, keepSize ? FALLOC_FL_KEEP_SIZE : 0, offset, length);
    if (result !== undefined && result < 0) return result;
    if (!keepSize && offset + length > this.size) this.truncate(offset + length);
    return 0;
  }

  sync(): void {
    fs.fsyncSync(this.#fd);
  }

  close(): void {
    this.#holes?.kernel.close(this.#holes.fd);
    fs.closeSync(this.#fd);
  }
}

/** The same file for the calls that node:fs lacks. */
function openAgain(fd: number, writable: boolean): { readonly kernel: LinuxKernel; readonly fd: number } | null {
  if (process.platform !== 'linux' || !fs.fstatSync(fd).isFile()) return null;
  try {
    const kernel = linuxKernel();
    const again = kernel.open(`/proc/self/fd/${fd}`, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    return again < 0 ? null : { kernel, fd: again };
  } catch {
    return null;
  }
}
