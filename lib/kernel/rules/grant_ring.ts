import { formatBytes, hex } from '../../format.ts';
import { big, isAligned, isZero } from '../arguments.ts';
import { GRANT_RING_ENTRIES } from '../machine.ts';
import type { VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';
import type { EnableCapRequest } from './vm.ts';

export interface GrantRingSubject {
  readonly vm: VmFile;
  /** It is enabled. */
  readonly hasRing: boolean;
}

/** KVM_ENABLE_CAP with the proposed ring of grants. args: [guest physical address of its page, entries]. */
export const grantRingRules: readonly Rule<GrantRingSubject, EnableCapRequest>[] = [
  rule(
    'EINVAL',
    'grant-ring-vm',
    ({ vm }) =>
      !vm.convertsInPlace && 'this VM has no memory that is converted in place, so its guest has nothing to grant',
  ),
  rule('EINVAL', 'grant-ring-flags', (_subject, { flags, args }) => {
    return (flags !== 0 || !isZero(args[2]) || !isZero(args[3])) && 'flags and the last two arguments are not 0';
  }),
  rule('EINVAL', 'grant-ring-page', ({ vm }, { args }) => {
    return !isAligned(args[0], vm.machine.pageSize) && `${hex(args[0])} is not the address of a page`;
  }),
  rule('EINVAL', 'grant-ring-entries', (_subject, { args }) => {
    const entries = big(args[1]);
    const fits = entries > 0n && entries <= GRANT_RING_ENTRIES && (entries & (entries - 1n)) === 0n;
    return !fits && `${entries} entries are not a power of two up to ${GRANT_RING_ENTRIES}`;
  }),
  rule('EINVAL', 'grant-ring-limit', ({ vm }, { args }) => {
    const end = 1n << BigInt(vm.machine.isArm ? vm.ipaBits : vm.machine.physicalAddressBits);
    return big(args[0]) >= end && `the VM has no address ${formatBytes(args[0])}`;
  }),
  rule('EEXIST', 'grant-ring-once', ({ hasRing }) => hasRing && 'the VM has a ring of grants already'),
];
