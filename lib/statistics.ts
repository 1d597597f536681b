import { KvmError, systemError } from './errors.ts';
import type { Kernel } from './kernel/kernel.ts';
import { ERRNO } from './uapi.ts';

/** Counters by their names in the kernel; a histogram is a list. Exact up to 2^53. */
export type Statistics = Readonly<Record<string, number | readonly number[]>>;

const HEADER = 24;
/** Of a descriptor, before the name. */
const DESCRIPTOR = 16;
/** No kernel has as much to tell. */
const LONGEST = 1 << 20;

/** Reads the file of KVM_GET_STATS_FD: what it holds stands in it, so new counters come by themselves. */
export function readStatistics(kernel: Kernel, fd: number): Statistics {
  const file = kernel.getStatsFd(fd);
  const request = { syscall: 'ioctl', request: 'KVM_GET_STATS_FD' };
  if (file === -ERRNO.ENOTTY || file === -ERRNO.EINVAL)
    throw KvmError.unsupported('this kernel keeps no statistics for its users (KVM_GET_STATS_FD): Linux 5.14 does');
  if (file < 0)
    throw systemError(file, request, file === -ERRNO.EBUSY ? 'the vCPU runs: ask when it has come back' : null);
  try {
    const read = (offset: number, size: number): DataView => {
      const bytes = new Uint8Array(Math.min(size, LONGEST));
      const count = kernel.pread(file, bytes, offset);
      if (count < 0) throw systemError(count, { syscall: 'pread' }, kernel.explain());
      return new DataView(bytes.buffer, 0, count);
    };
    const header = read(0, HEADER);
    const [nameSize = 0, count = 0, , descriptors = 0, data = 0] = [4, 8, 12, 16, 20].map((at) =>
      header.getUint32(at, true),
    );
    const stride = DESCRIPTOR + nameSize;
    const table = read(descriptors, count * stride);
    const entries = Array.from({ length: Math.floor(table.byteLength / stride) }, (_, index) => {
      const at = index * stride;
      const name = new Uint8Array(table.buffer, at + DESCRIPTOR, nameSize);
      return {
        name: new TextDecoder('latin1').decode(name.subarray(0, (name.indexOf(0) + nameSize + 1) % (nameSize + 1))),
        length: table.getUint16(at + 6, true),
        offset: table.getUint32(at + 8, true),
      };
    });
    const values = read(data, Math.max(0, ...entries.map(({ length, offset }) => offset + 8 * length)));
    const value = (offset: number): number => Number(values.getBigUint64(offset, true));
    return Object.fromEntries(
      entries.map(({ name, length, offset }) => [
        name,
        length === 1 ? value(offset) : Array.from({ length }, (_, index) => value(offset + 8 * index)),
      ]),
    );
  } finally {
    kernel.close(file);
  }
}
