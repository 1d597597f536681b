import type { Stop } from './executor.ts';

/** Bytes of a name in a statistics file. */
const NAME_SIZE = 48;
const HEADER = 24;
const DESCRIPTOR = 16 + NAME_SIZE;

/**
 * What a vCPU of the model counts, by the names of Linux. `pf_taken` and `pf_fixed` are faults of the second stage; Linux counts them on x86
 * only, and the model on arm64 too.
 */
export function vcpuCounters(isArm: boolean): Record<string, number> {
  const exits = isArm
    ? ['mmio_exit_user', 'hvc_exit_stat', 'signal_exits']
    : ['io_exits', 'mmio_exits', 'hypercalls', 'halt_exits', 'signal_exits'];
  return Object.fromEntries(['pf_taken', 'pf_fixed', 'exits', ...exits].map((name) => [name, 0]));
}

/** The counter of an exit; null for one that has none of its own. */
export function exitCounter({ kind }: Stop, isArm: boolean): string | null {
  switch (kind) {
    case 'io':
      return isArm ? null : 'io_exits';
    case 'mmio':
      return isArm ? 'mmio_exit_user' : 'mmio_exits';
    case 'hypercall':
      return isArm ? 'hvc_exit_stat' : 'hypercalls';
    case 'hlt':
      return isArm ? null : 'halt_exits';
    case 'deadline':
      return 'signal_exits';
    default:
      return null;
  }
}

/** The file of KVM_GET_STATS_FD: a header, what it belongs to, a descriptor for each counter, and their values. */
export function statisticsFile(id: string, counters: Readonly<Record<string, number>>): Uint8Array {
  const names = Object.keys(counters);
  const descriptors = HEADER + NAME_SIZE;
  const data = descriptors + names.length * DESCRIPTOR;
  const bytes = Buffer.alloc(data + 8 * names.length);
  for (const [index, word] of [0, NAME_SIZE, names.length, HEADER, descriptors, data].entries())
    bytes.writeUInt32LE(word, 4 * index);
  bytes.write(id, HEADER, 'latin1');
  for (const [index, name] of names.entries()) {
    const at = descriptors + index * DESCRIPTOR;
    // Cumulative, without a unit: only the number of values and the offset of the first are not 0.
    bytes.writeUInt16LE(1, at + 6);
    bytes.writeUInt32LE(8 * index, at + 8);
    bytes.write(name, at + 16, 'latin1');
    bytes.writeBigUInt64LE(BigInt(counters[name] ?? 0), data + 8 * index);
  }
  return bytes;
}
