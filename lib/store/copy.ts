import fs from 'node:fs';
import { KvmError, systemError } from '../errors.ts';
import type { GuestMemfd } from '../guest_memfd.ts';
import type { FileRange } from '../guest_range.ts';
import type { HostMemory } from '../host_memory.ts';
import { dataExtents } from '../kernel/data_extents.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { O_CLOEXEC, O_RDONLY } from '../uapi.ts';
import type { Disk } from './disk.ts';

/** Memory that is copied into a data file. */
export interface Source {
  readonly memory: HostMemory | GuestMemfd;
  /** Where its first byte goes. */
  readonly at: number;
  readonly mapping: number;
  /** Of the file behind it, which knows its holes; -1 without. */
  readonly fd: number;
}

const CHUNK = 1 << 20;
const MINCORE_PAGES = 1 << 20;

/** What may hold something else than zeros, in chunks. */
function* candidates(kernel: Kernel, { memory, mapping, fd }: Source): Generator<FileRange> {
  if (fd >= 0) {
    for (const { start, end } of dataExtents(kernel, fd, 0, memory.size)) yield* chunks(start, end);
    return;
  }
  // mincore(2) does not count pages that are in swap.
  if (hasSwap()) {
    yield* chunks(0, memory.size);
    return;
  }
  const { pageSize } = kernel;
  const pages = memory.size / pageSize;
  const residency = new Uint8Array(Math.min(MINCORE_PAGES, pages));
  for (let first = 0; first < pages; first += residency.length) {
    const count = Math.min(residency.length, pages - first);
    const result = kernel.mincore(mapping, first * pageSize, count * pageSize, residency);
    if (result < 0) throw systemError(result, { syscall: 'mincore' }, kernel.explain());
    for (let page = 0; page < count; ) {
      const start = residency.indexOf(1, page);
      if (start < 0 || start >= count) break;
      const hole = residency.indexOf(0, start);
      page = hole < 0 ? count : Math.min(hole, count);
      yield* chunks((first + start) * pageSize, (first + page) * pageSize);
    }
  }
}

function hasSwap(): boolean {
  try {
    return fs.readFileSync('/proc/swaps', 'utf8').trim().includes('\n');
  } catch {
    return process.platform === 'linux';
  }
}

function* chunks(start: number, end: number): Generator<FileRange> {
  for (let offset = start; offset < end; offset += CHUNK) yield { offset, size: Math.min(CHUNK, end - offset) };
}

/** Memory into an open data file; what is zero stays a hole. */
export function copyOut(disk: Disk, kernel: Kernel, source: Source, fd: number): void {
  const { pageSize } = kernel;
  const buffer = new Uint8Array(CHUNK);
  const zeros = new Uint8Array(pageSize);
  for (const { offset, size } of candidates(kernel, source)) {
    const bytes = buffer.subarray(0, size);
    if (kernel.peek(source.mapping, offset, bytes) < size)
      throw new KvmError({
        code: 'EFAULT',
        message: `${size} bytes at ${offset} of the memory cannot be read: somebody has cut the file behind it`,
      });
    const isZero = (page: number): boolean =>
      Buffer.compare(bytes.subarray(page, page + pageSize), zeros.subarray(0, Math.min(pageSize, size - page))) === 0;
    for (let page = 0; page < size; ) {
      if (isZero(page)) {
        page += pageSize;
        continue;
      }
      const start = page;
      while (page < size && !isZero(page)) page += pageSize;
      const end = Math.min(page, size);
      for (let done = start; done < end; )
        done += disk.fs.writeSync(fd, bytes, done, end - done, source.at + offset + done);
    }
  }
}

/** A part of a data file into memory that is all zeros. */
export function copyIn(disk: Disk, kernel: Kernel, path: string, from: FileRange, mapping: number): void {
  const holes = kernel.open(path, O_RDONLY | O_CLOEXEC);
  if (holes < 0) throw systemError(holes, { syscall: 'open', args: { path } }, kernel.explain());
  const buffer = new Uint8Array(CHUNK);
  try {
    disk.on(path, () => {
      const fd = disk.fs.openSync(path, 'r');
      try {
        for (const { start, end } of dataExtents(kernel, holes, from.offset, from.offset + from.size)) {
          for (const { offset, size } of chunks(start, end)) {
            const count = disk.fs.readSync(fd, buffer, 0, size, offset);
            const bytes = buffer.subarray(0, count);
            const poked = kernel.poke(mapping, offset - from.offset, bytes);
            if (poked < count || count < size)
              throw new KvmError({
                code: 'EFAULT',
                message: `only ${Math.max(0, poked)} of ${size} bytes at ${offset} of ${path} could be copied`,
              });
          }
        }
      } finally {
        disk.fs.closeSync(fd);
      }
    });
  } finally {
    kernel.close(holes);
  }
}
