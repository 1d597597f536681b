import { ERRNO, SEEK_DATA, SEEK_HOLE } from '../uapi.ts';
import type { Kernel } from './kernel.ts';

/** The parts of a file's bytes [offset, end) that are not holes, in order; the rest is one part where the file system cannot say. */
export function* dataExtents(
  kernel: Pick<Kernel, 'lseek'>,
  fd: number,
  offset: number,
  end: number,
): Generator<{ readonly start: number; readonly end: number }> {
  for (let at = offset; at < end; ) {
    const start = kernel.lseek(fd, at, SEEK_DATA);
    if (start === -ERRNO.ENXIO || start >= end) return;
    const hole = start < 0 ? start : kernel.lseek(fd, start, SEEK_HOLE);
    const stop = hole < 0 ? end : Math.min(end, hole);
    yield { start: Math.max(at, start), end: stop };
    at = stop;
  }
}
