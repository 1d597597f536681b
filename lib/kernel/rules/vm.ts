import { hex } from '../../format.ts';
import { KVM_CAP } from '../../uapi.ts';
import { big, hasOtherBits, low32, u64 } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import { checkExtension, type Machine } from '../machine.ts';
import type { VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

/** KVM_CREATE_VM. Contract §3. */
export const createVmRules: readonly Rule<Machine, { type: U64 }>[] = [
  rule('EINVAL', 'vm-type', (machine, { type }) => {
    if (machine.isArm) return false;
    const supported = typeof type === 'number' && type < 32 && (machine.vmTypes >>> type) & 1;
    return (
      !supported && `this kernel cannot create VMs of type ${type} (it has types with bits ${hex(machine.vmTypes)} set)`
    );
  }),
  rule('EINVAL', 'vm-type-bits', (machine, { type }) => {
    const mask = machine.since('7.1') ? 0x800000ff : 0xff;
    return machine.isArm && hasOtherBits(type, mask) && `machine type ${hex(type)} has bits outside ${hex(mask)}`;
  }),
  rule('EINVAL', 'ipa-size', (machine, { type }) => {
    const bits = low32(type) & 0xff;
    if (!machine.isArm || machine.pkvm || bits === 0) return false;
    return (
      (bits < 32 || bits > machine.ipaLimit) &&
      `${bits} bits of guest physical address are outside 32–${machine.ipaLimit}`
    );
  }),
  rule('EINVAL', 'protected', (machine, { type }) => {
    const wanted = machine.isArm && (big(type) & 0x80000000n) !== 0n;
    return wanted && !machine.pkvm && 'protected VMs need a host booted with kvm-arm.mode=protected';
  }),
];

/** The request as a 64-bit machine word. */
export function vmType(type: U64): { type: U64 } {
  return { type: u64('type', type) };
}

export interface EnableCapRequest {
  readonly cap: number;
  readonly flags: number;
  readonly args: readonly [U64, U64, U64, U64];
}

/** The largest ring KVM accepts, in bytes: 65536 entries of 16. */
const RING_MAX = 65536 * 16;
/** The kernel passes the size on in 32 bits. */
const ringSize = (value: U64): number => low32(value);
const rings: readonly number[] = [KVM_CAP.DIRTY_LOG_RING, KVM_CAP.DIRTY_LOG_RING_ACQ_REL];
const known: readonly number[] = [
  ...rings,
  KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2,
  KVM_CAP.EXIT_HYPERCALL,
  KVM_CAP.DIRTY_LOG_RING_WITH_BITMAP,
];

/** KVM_ENABLE_CAP on a VM fd. Contract §5. */
export const enableCapRules: readonly Rule<VmFile, EnableCapRequest>[] = [
  rule('EINVAL', 'cap-unknown', (vm, { cap }) => {
    const there = known.includes(cap) && checkExtension(vm.machine, cap, vm) > 0;
    return !there && `capability ${cap} cannot be enabled on this VM`;
  }),
  rule(
    'EINVAL',
    'cap-flags',
    (_vm, { cap, flags }) => flags !== 0 && !rings.includes(cap) && `flags are ${hex(flags)}, not 0`,
  ),
  rule('EINVAL', 'manual-dirty-log', (_vm, { cap, args }) => {
    const allowed = low32(args[0]) & 1 ? 3 : 1;
    return (
      cap === KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2 &&
      hasOtherBits(args[0], allowed) &&
      `the value is ${args[0]}, not 0, 1 or 3`
    );
  }),
  rule('EINVAL', 'exit-hypercall', (_vm, { cap, args }) => {
    return (
      cap === KVM_CAP.EXIT_HYPERCALL &&
      hasOtherBits(args[0], 0x1000) &&
      `only hypercall 12 (0x1000) can exit, not ${hex(args[0])}`
    );
  }),
  rule('EINVAL', 'ring-size', (vm, { cap, args }) => {
    const size = ringSize(args[0]);
    const fits = size >= vm.machine.pageSize && Number.isInteger(Math.log2(size));
    return rings.includes(cap) && !fits && `a dirty ring of ${size} bytes is not a power of two of at least one page`;
  }),
  rule('E2BIG', 'ring-too-big', (_vm, { cap, args }) => {
    return rings.includes(cap) && ringSize(args[0]) > RING_MAX && `a dirty ring has at most ${RING_MAX} bytes`;
  }),
  rule(
    'EINVAL',
    'ring-vcpus',
    (vm, { cap }) => rings.includes(cap) && vm.vcpuIds.size > 0 && 'a dirty ring is enabled before the first vCPU',
  ),
  rule(
    'EINVAL',
    'ring-once',
    (vm, { cap }) => rings.includes(cap) && vm.dirtyRing !== 'none' && 'the dirty ring is enabled already',
  ),
  rule('EINVAL', 'ring-bitmap', (vm, { cap }) => {
    if (cap !== KVM_CAP.DIRTY_LOG_RING_WITH_BITMAP) return false;
    return (
      (vm.dirtyRing === 'none' || vm.hasSlots) &&
      'the bitmap beside a dirty ring is enabled after the ring and before the first slot'
    );
  }),
];

export function applyEnableCap(vm: VmFile, { cap, args }: EnableCapRequest): void {
  switch (cap) {
    case KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2:
      vm.manualDirtyLog = low32(args[0]);
      break;
    case KVM_CAP.EXIT_HYPERCALL:
      vm.hypercallMask = low32(args[0]);
      break;
    case KVM_CAP.DIRTY_LOG_RING_WITH_BITMAP:
      vm.dirtyRing = 'ring-with-bitmap';
      break;
    case KVM_CAP.DIRTY_LOG_RING:
    case KVM_CAP.DIRTY_LOG_RING_ACQ_REL:
      vm.dirtyRing = 'ring';
  }
}
