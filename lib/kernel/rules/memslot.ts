import { formatBytes, formatRange, hex } from '../../format.ts';
import { GUEST_MEMFD_FLAG_MMAP, KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY } from '../../uapi.ts';
import { big, i32, isAligned, isZero, sumExceeds, toPages, u32, u64, wraps } from '../arguments.ts';
import type { U64, UserMemoryRegion } from '../kernel.ts';
import { GuestMemfdFile, type MemslotState, type OpenFile, type RegionRequest, type VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

type SlotRule = Rule<VmFile, RegionRequest>;

const existing = (vm: VmFile, r: RegionRequest): MemslotState | undefined => vm.slot(r.addressSpace, r.id);
const isDelete = (r: RegionRequest): boolean => isZero(r.memorySize);
const isCreate = (vm: VmFile, r: RegionRequest): boolean => !isDelete(r) && !existing(vm, r);
const binds = (vm: VmFile, r: RegionRequest): boolean => isCreate(vm, r) && (r.flags & KVM_MEM_GUEST_MEMFD) !== 0;
const boundFile = (r: RegionRequest): GuestMemfdFile | undefined =>
  r.file instanceof GuestMemfdFile ? r.file : undefined;
const range = (r: RegionRequest): string => formatRange(r.guestPhysAddr, r.memorySize);

function slotRange(vm: VmFile, slot: MemslotState): string {
  return formatRange(slot.baseGfn * vm.machine.pageSize, slot.pages * vm.machine.pageSize);
}

function firstGfn(vm: VmFile, r: RegionRequest): number {
  return toPages(r.guestPhysAddr, vm.machine.pageSize);
}

function lastGfn(vm: VmFile, r: RegionRequest): number {
  return firstGfn(vm, r) + toPages(r.memorySize, vm.machine.pageSize);
}

function allowedFlags(vm: VmFile, r: RegionRequest): number {
  const gmem = vm.machine.since('6.18') || vm.hasPrivate ? KVM_MEM_GUEST_MEMFD : 0;
  const bound = r.flags & gmem;
  return gmem | (bound ? 0 : KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY);
}

/** A request in canonical form, from the struct as the caller gave it: each field is read once. */
export function regionRequest(
  region: UserMemoryRegion,
  guestMemfdOffset: U64,
  guestMemfd: number,
  v1: boolean,
  fileOf: (fd: number) => OpenFile | undefined,
): RegionRequest {
  const slot = u32('slot', region.slot);
  const fd = i32('guestMemfd', guestMemfd);
  return {
    v1,
    addressSpace: slot >>> 16,
    id: slot & 0xffff,
    flags: u32('flags', region.flags),
    guestPhysAddr: u64('guestPhysAddr', region.guestPhysAddr),
    memorySize: u64('memorySize', region.memorySize),
    userspaceAddr: u64('userspaceAddr', region.userspaceAddr),
    guestMemfdOffset: u64('guestMemfdOffset', guestMemfdOffset),
    guestMemfd: fd,
    file: fileOf(fd),
  };
}

/** Whether the request equals the slot as it is: a successful no-op. Contract §10.1 row 15. */
export function isSameRegion(vm: VmFile, r: RegionRequest): boolean {
  const slot = existing(vm, r);
  return !!slot && !isDelete(r) && slot.flags === r.flags && slot.baseGfn === firstGfn(vm, r);
}

const bindingOverlap: SlotRule = rule(
  ({ machine }) => (machine.since('7.2') ? 'EEXIST' : 'EINVAL'),
  'gmem-binding-overlap',
  (vm, r) => {
    if (!binds(vm, r) || !(r.file instanceof GuestMemfdFile)) return false;
    const { pageSize } = vm.machine;
    const start = toPages(r.guestMemfdOffset, pageSize);
    const end = start + toPages(r.memorySize, pageSize);
    if (!r.file.bindings.overlaps(start, end)) return false;
    const [taken] = r.file.bindings.within(start, end);
    if (!taken) return false;
    return (
      `slot ${r.id} ${range(r)} would bind bytes ${hex(start * pageSize)}–${hex(end * pageSize)} of guest_memfd fd ${r.guestMemfd}, ` +
      `of which slot ${taken.value.id} already has ${hex(taken.start * pageSize)}–${hex(taken.end * pageSize)}; ` +
      `bind other bytes, or remove slot ${taken.value.id} first`
    );
  },
);

const before72 = (one: SlotRule): SlotRule => ({
  ...one,
  broken: (vm, r) => !vm.machine.since('7.2') && one.broken(vm, r),
});
const since72 = (one: SlotRule): SlotRule => ({
  ...one,
  broken: (vm, r) => vm.machine.since('7.2') && one.broken(vm, r),
});

/** KVM_SET_USER_MEMORY_REGION and …2. Contract §10.1; the numbers of its rows stand in the comments. */
export const memslotRules: readonly SlotRule[] = [
  // 2–4
  rule('EINVAL', 'v1-flags', (_vm, r) => {
    const wrong = r.v1 && r.flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY);
    return wrong && `KVM_SET_USER_MEMORY_REGION has no flags ${hex(r.flags)}`;
  }),
  rule(
    'EINVAL',
    'slot-id',
    ({ machine }, r) => r.id >= machine.userSlots && `slot ${r.id} is past the last one, ${machine.userSlots - 1}`,
  ),
  rule('EINVAL', 'slot-flags', (vm, r) => {
    const wrong = r.flags & ~allowedFlags(vm, r);
    if (!wrong) return false;
    if (r.flags & KVM_MEM_GUEST_MEMFD && wrong & ~KVM_MEM_GUEST_MEMFD && !(wrong & ~7))
      return 'a slot with a guest_memfd can be neither read-only nor dirty-logged';
    if (wrong === KVM_MEM_GUEST_MEMFD)
      return 'this kernel has guest_memfd slots only in VMs with private memory (before Linux 6.18)';
    return `flags ${hex(r.flags)} are not supported by this VM`;
  }),
  // 5–8
  rule(
    'EINVAL',
    'slot-size',
    ({ machine }, r) =>
      !isAligned(r.memorySize, machine.pageSize) &&
      `size ${hex(r.memorySize)} is not a multiple of ${machine.pageSize}`,
  ),
  rule(
    'EINVAL',
    'slot-address',
    ({ machine }, r) =>
      !isAligned(r.guestPhysAddr, machine.pageSize) &&
      `guest address ${hex(r.guestPhysAddr)} is not a multiple of ${machine.pageSize}`,
  ),
  rule('EINVAL', 'slot-host-address', ({ machine }, r) => {
    const wrong =
      !isAligned(r.userspaceAddr, machine.pageSize) || sumExceeds(r.userspaceAddr, r.memorySize, machine.taskSize);
    return wrong && `host address ${hex(r.userspaceAddr)} is not a page of this process`;
  }),
  rule('EINVAL', 'gmem-offset', ({ machine }, r) => {
    const wrong = !isAligned(r.guestMemfdOffset, machine.pageSize) || wraps(r.guestMemfdOffset, r.memorySize);
    return (
      r.flags & KVM_MEM_GUEST_MEMFD && wrong && `guest_memfd offset ${hex(r.guestMemfdOffset)} is not a page of a file`
    );
  }),
  // 9–11
  rule(
    'EINVAL',
    'slot-address-space',
    (vm, r) => r.addressSpace >= vm.addressSpaceIds && `this VM has no address space ${r.addressSpace}`,
  ),
  rule(
    'EINVAL',
    'slot-wraps',
    (_vm, r) => wraps(r.guestPhysAddr, r.memorySize) && `${range(r)} reaches the end of the address space`,
  ),
  rule(
    'EINVAL',
    'slot-pages',
    ({ machine }, r) => big(r.memorySize) / BigInt(machine.pageSize) > 0x7fffffffn && 'a slot has at most 2^31-1 pages',
  ),
  // 12–14
  rule('EINVAL', 'slot-absent', (vm, r) => isDelete(r) && !existing(vm, r) && `there is no slot ${r.id} to delete`),
  rule('EINVAL', 'gmem-immutable', (vm, r) => {
    const slot = existing(vm, r);
    if (!slot || isDelete(r)) return false;
    if (slot.flags & KVM_MEM_GUEST_MEMFD)
      return `slot ${r.id} is bound to a guest_memfd and can only be deleted and created again`;
    return r.flags & KVM_MEM_GUEST_MEMFD && `slot ${r.id} exists without a guest_memfd: delete it and create it again`;
  }),
  rule('EINVAL', 'slot-immutable', (vm, r) => {
    const slot = existing(vm, r);
    if (!slot || isDelete(r)) return false;
    if (slot.userspaceAddr !== r.userspaceAddr) return `the host address of slot ${r.id} cannot change`;
    if (slot.pages !== toPages(r.memorySize, vm.machine.pageSize)) return `slot ${r.id} cannot be resized`;
    return (
      (slot.flags ^ r.flags) & KVM_MEM_READONLY &&
      `slot ${r.id} cannot become ${r.flags & KVM_MEM_READONLY ? 'read-only' : 'writable'}`
    );
  }),
  // 16
  rule('EEXIST', 'gpa-overlap', (vm, r) => {
    if (isDelete(r) || isSameRegion(vm, r)) return false;
    const slot = existing(vm, r);
    const other = vm.slotOverlapping(r.addressSpace, firstGfn(vm, r), lastGfn(vm, r), slot);
    return other && `slot ${r.id} ${range(r)} overlaps slot ${other.id} ${slotRange(vm, other)}`;
  }),
  // 17–18
  rule('EBADF', 'gmem-fd', (vm, r) => binds(vm, r) && !r.file && `fd ${r.guestMemfd} is not open`),
  rule(
    'EINVAL',
    'gmem-kind',
    (vm, r) => binds(vm, r) && !(r.file instanceof GuestMemfdFile) && `fd ${r.guestMemfd} is not a guest_memfd`,
  ),
  rule(
    'EINVAL',
    'gmem-vm',
    (vm, r) => binds(vm, r) && boundFile(r)?.vm !== vm && `guest_memfd fd ${r.guestMemfd} belongs to another VM`,
  ),
  rule('EINVAL', 'gmem-end', (vm, r) => {
    const file = boundFile(r);
    const beyond = file && binds(vm, r) && sumExceeds(r.guestMemfdOffset, r.memorySize, file.size);
    return (
      beyond &&
      `${formatBytes(r.memorySize)} from offset ${formatBytes(r.guestMemfdOffset)} end past the end of guest_memfd fd ${r.guestMemfd}, ${formatBytes(file.size)}`
    );
  }),
  before72(bindingOverlap),
  // 20: §10.5, §10.6
  rule('EINVAL', 'gpa-limit', ({ machine }, r) => {
    const limit = 1n << BigInt(machine.physicalAddressBits);
    return (
      !machine.isArm &&
      !isDelete(r) &&
      sumExceeds(r.guestPhysAddr, r.memorySize, limit) &&
      `${range(r)} ends above the ${machine.physicalAddressBits} bits of physical address here`
    );
  }),
  rule('EPERM', 'protected-has-run', (vm, r) => {
    const changes = existing(vm, r) && !isSameRegion(vm, r);
    return vm.isProtected && vm.firstRun !== null && changes && 'slots of a protected VM cannot change once it has run';
  }),
  rule('EPERM', 'protected-flags', (vm, r) => {
    const wrong = vm.isProtected && !isDelete(r) && r.flags & (KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY);
    return wrong && !isSameRegion(vm, r) && 'slots of a protected VM can be neither read-only nor dirty-logged';
  }),
  rule('EFAULT', 'ipa-limit', (vm, r) => {
    const beyond =
      vm.machine.isArm && !isDelete(r) && sumExceeds(r.guestPhysAddr, r.memorySize, 1n << BigInt(vm.ipaBits));
    return beyond && `${range(r)} ends above the ${vm.ipaBits} bits of guest physical address of this VM`;
  }),
  rule('EINVAL', 'gmem-needs-mmap', (vm, r) => {
    const lacks = vm.machine.isArm && binds(vm, r) && !((boundFile(r)?.flags ?? 0) & GUEST_MEMFD_FLAG_MMAP);
    return lacks && 'on arm64 a slot needs a guest_memfd created with MMAP';
  }),
  // 21
  since72(bindingOverlap),
];
