import { KvmError } from '../errors.ts';
import type { FileRange } from '../guest_range.ts';
import type { HostMemory } from '../host_memory.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { SEEK_DATA, SEEK_HOLE } from '../uapi.ts';

/** The parts of a memory that may hold something: of a file what is no hole, of anything else all of it. */
export function* dataRanges(kernel: Kernel, memory: HostMemory, { offset, size }: FileRange): Generator<FileRange> {
  const { fd } = memory.backing;
  const end = offset + size;
  for (let at = offset; at < end; ) {
    const start = fd < 0 ? at : kernel.lseek(fd, at, SEEK_DATA);
    // ENXIO: no more data.
    if (start < 0 || start >= end) return;
    const stop = fd < 0 ? end : kernel.lseek(fd, start, SEEK_HOLE);
    const reached = stop < 0 ? end : Math.min(end, stop);
    yield { offset: start, size: reached - start };
    at = reached;
  }
}

export function readMemory(kernel: Kernel, memory: HostMemory, { offset, size }: FileRange): Uint8Array {
  const content = new Uint8Array(size);
  for (let done = 0; done < size; ) {
    const copied = kernel.peek(memory.backing.mapping, offset + done, content.subarray(done));
    if (copied <= 0) throw fault(offset + done);
    done += copied;
  }
  return content;
}

export function writeMemory(kernel: Kernel, memory: HostMemory, offset: number, content: Uint8Array): void {
  for (let done = 0; done < content.length; ) {
    const copied = kernel.poke(memory.backing.mapping, offset + done, content.subarray(done));
    if (copied <= 0) throw fault(offset + done);
    done += copied;
  }
}

const ZEROS = Buffer.alloc(1 << 16);

export function isZero(content: Uint8Array): boolean {
  for (let at = 0; at < content.length; at += ZEROS.length) {
    const part = content.subarray(at, at + ZEROS.length);
    if (ZEROS.compare(part, 0, part.length, 0, part.length) !== 0) return false;
  }
  return true;
}

function fault(offset: number): KvmError {
  return new KvmError({
    code: 'EFAULT',
    errno: -14,
    message: `the host has no page at byte ${offset} of the memory (EFAULT)`,
    errorOffset: offset,
  });
}
