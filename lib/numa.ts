import { KvmError, systemError } from './errors.ts';
import { list } from './format.ts';
import type { FileRange } from './guest_range.ts';
import type { Kernel } from './kernel/kernel.ts';
import { ERRNO } from './uapi.ts';
import { integer, oneOf, options, rangeError, shown, typeError } from './validate.ts';

/** By their numbers in mbind(2). */
const modes = ['default', 'preferred', 'bind', 'interleave', 'local', 'preferred-many', 'weighted-interleave'] as const;
export type NumaMode = (typeof modes)[number];

/** From which NUMA nodes pages are taken that come into being from now on; those that are there stay where they are. */
export interface NumaPolicy {
  /**
   * 'default' is the thread's own policy, 'local' the node of the CPU that touches; the others name nodes: 'preferred' one at most,
   * 'preferred-many' since Linux 5.15, 'weighted-interleave' since 6.9.
   */
  readonly mode: NumaMode;
  /** 0 to 1023. */
  readonly nodes?: readonly number[];
}

const MOST_NODES = 1024;
const needsNodes: readonly NumaMode[] = ['bind', 'interleave', 'preferred-many', 'weighted-interleave'];

/** A policy as the kernel takes it: read once. */
export function numaPolicy(given: NumaPolicy): { mode: NumaMode; nodes: readonly number[] } {
  const read = options('policy', given);
  const mode = oneOf('policy.mode', read.mode, modes);
  const wanted: unknown = read.nodes ?? [];
  if (!Array.isArray(wanted)) throw typeError(`policy.nodes must be an array of numbers, got ${shown(wanted)}`);
  if (wanted.length > MOST_NODES) throw rangeError(`policy.nodes names at most ${MOST_NODES} nodes`);
  const nodes = Array.from(wanted as unknown[], (node, index) => integer(`policy.nodes[${index}]`, node, 0, 1023));
  if (needsNodes.includes(mode) && nodes.length === 0) throw rangeError(`policy '${mode}' names the nodes it is about`);
  if ((mode === 'default' || mode === 'local') && nodes.length > 0)
    throw rangeError(`policy '${mode}' names no nodes, got ${list(nodes.map(String))}`);
  if (mode === 'preferred' && nodes.length > 1) throw rangeError("policy 'preferred' names one node at most");
  return { mode, nodes };
}

/** mbind(2) of a range of a mapping. */
export function setPolicy(
  kernel: Kernel,
  mapping: number,
  { offset, size }: FileRange,
  { mode, nodes }: { mode: NumaMode; nodes: readonly number[] },
): void {
  const result = kernel.mbind(mapping, offset, size, modes.indexOf(mode), nodes);
  if (result >= 0) return;
  if (result === -ERRNO.ENOSYS)
    throw KvmError.unsupported('this kernel was built without NUMA (CONFIG_NUMA): memory has one place only');
  const reason = result === -ERRNO.EINVAL ? invalidPolicy(offset % kernel.pageSize, mode, nodes) : kernel.explain();
  throw systemError(result, { syscall: 'mbind', args: { offset, size, mode, nodes } }, reason);
}

function invalidPolicy(past: number, mode: NumaMode, nodes: readonly number[]): string {
  if (past !== 0) return 'the range does not begin at a page';
  return nodes.length > 0
    ? `the host has no NUMA node ${list(nodes.map(String))} that this process may use (/sys/devices/system/node/online)`
    : `this kernel has no policy '${mode}'`;
}

/** get_mempolicy(2) of the page at an offset. */
export function policyAt(kernel: Kernel, mapping: number, offset: number): NumaMode {
  const result = kernel.getMempolicy(mapping, offset);
  if (result === -ERRNO.ENOSYS) return 'default';
  const mode = modes[result];
  if (mode === undefined) throw systemError(result, { syscall: 'get_mempolicy', args: { offset } }, kernel.explain());
  return mode;
}
