import type { Kernel } from '../../lib/kernel/kernel.ts';
import {
  GiB,
  KVM_MEM_GUEST_MEMFD,
  MADV_HWPOISON,
  MADV_SOFT_OFFLINE,
  MAP_ANONYMOUS,
  MAP_FIXED,
  MAP_FIXED_NOREPLACE,
  MiB,
  PROT_EXEC,
} from '../../lib/uapi.ts';
import { compareVersions } from '../conformance/scenario.ts';
import { capsEnabled } from './capabilities.ts';
import { type Mirror, slotKey } from './mirror.ts';
import { type ByGuest, isMappedPage, type Step } from './program.ts';

// What no random program may send, each with its name: what would harm the machine, what would cost it all its memory or minutes of
// its time, and what the contract says differs for reasons that no model has.

type SetRegion = Step & { call: 'setUserMemoryRegion' | 'setUserMemoryRegion2' };

/** Units: pages. */
const SLOT_MAX = 1 << 16;
const ATTRIBUTES_MAX = 1 << 12;
const ALLOCATE_MAX = 256;
const MAP_MAX = 256;
/** Where virtual addresses end, with page tables of four levels. */
const CANONICAL = 2 ** 47;
/** Where the guest agent of test/conformance/guest.ts lives, and its doorbell. */
const AGENT_SLOT = 31;
const AGENT_FROM = 511 * MiB;
const AGENT_TO = 514 * MiB;
const DOORBELL_FROM = 3 * GiB - MiB;
const DOORBELL_TO = 3 * GiB + MiB;

/** Why this step is not carried out, or null. */
export function excluded(step: Step, mirror: Mirror, kernel: Kernel): string | null {
  switch (step.call) {
    case 'setUserMemoryRegion':
    case 'setUserMemoryRegion2':
      return excludedRegion(step, mirror, kernel);
    case 'setMemoryAttributes': {
      const [address, size] = [mirror.value(step.address), mirror.value(step.size)];
      // Uninterruptible, and by the page.
      if (pagesOf(size, mirror) > ATTRIBUTES_MAX && BigInt(address) + BigInt(size) < 1n << 64n && step.flags === 0)
        return 'attributes of a huge range';
      const vm = mirror.vm(step.vm);
      return vm?.hasAgent && meetsAgent(Number(address), Number(size)) ? 'the memory of the guest agent' : null;
    }
    case 'fallocate': {
      const file = mirror.file(step.fd);
      const [offset, length] = [mirror.value(step.offset, file?.size), mirror.value(step.length, file?.size)];
      // Past its end a guest_memfd refuses; shmem has no end before that of all files.
      const end = file?.kind === 'gmem' ? BigInt(file.size) : (1n << 63n) - 1n;
      const fits = file !== undefined && BigInt(offset) + BigInt(length) <= end;
      return step.mode < 2 && fits && pagesOf(length, mirror) > ALLOCATE_MAX ? 'allocating much memory' : null;
    }
    case 'enableCap':
      // A program that shrinks comes by numbers that were never chosen.
      return capsEnabled.includes(step.cap) ? null : 'capabilities that no model has';
    case 'mmap': {
      if (step.flags & (MAP_FIXED | MAP_FIXED_NOREPLACE)) return 'mapping over memory of the process';
      if (step.prot & PROT_EXEC && mirror.world.number(step.fd) === mirror.world.number('kvm'))
        return 'executing /dev/kvm, which depends on how /dev is mounted';
      if (!(step.flags & MAP_ANONYMOUS) && mirror.mayBeVcpu(step.fd))
        return 'mapping a vCPU, for which there is runPage';
      const length = pagesOf(mirror.valueIn(step, step.length), mirror);
      return length > MAP_MAX && length < 2 ** 45 ? 'mappings of which only some fit' : null;
    }
    case 'close':
      return mirror.mayBeAgent(step.fd) ? 'closing the CPU of the guest agent' : null;
    case 'madvise':
      return step.advice === MADV_HWPOISON || step.advice === MADV_SOFT_OFFLINE ? 'poisoning memory' : null;
    case 'preFaultMemory':
      // It waits for page tables that only KVM_RUN renews: seen on 6.12.117, gone by 6.18.
      if (kernel.name !== 'software' && compareVersions(kernel.release, '6.18') < 0)
        return 'pre-faulting where it may never return, once a slot moved';
      return (
        mirror.vcpu(step.vcpu)?.unfit ??
        (pagesOf(mirror.value(step.size), mirror) > 64 &&
        BigInt(mirror.value(step.gpa)) + BigInt(mirror.value(step.size)) < 1n << 64n
          ? 'pre-faulting a huge range'
          : null)
      );
    case 'guestShare':
    case 'guestUnshare':
      return kernel.arch === 'aarch64' ? excludedAccess(step, mirror, kernel) : 'a call of pKVM';
    case 'guestRead':
    case 'guestWrite':
      return excludedAccess(step, mirror, kernel);
    default:
      return null;
  }
}

function excludedRegion(step: SetRegion, mirror: Mirror, kernel: Kernel): string | null {
  const vm = mirror.vm(step.vm);
  const [gpa, size] = [mirror.valueIn(step, step.gpa), mirror.valueIn(step, step.size)];
  const pages = pagesOf(size, mirror);
  // KVM keeps something for each page or each 512 of them, and allocates it before it looks at the last checks.
  if (pages > SLOT_MAX && pages < 2 ** 31) return 'a huge slot';
  const key = slotKey(step);
  const slot = vm?.slots.get(key);
  if (slot && slot.mapping !== null && !mirror.mappings[slot.mapping]?.alive && isMappedPage(step.hva))
    return 'a mapping that may be where the one of the slot was';
  if (slot && isMappedPage(step.hva)) {
    const mapping = mirror.mappings[mirror.world.mappingIndex(step.hva.mapping)];
    if (mapping && step.hva.page >= mapping.pages)
      return 'what may lie behind a mapping, compared with where the slot is';
  }
  if (vm?.hasAgent) {
    const moved = slot?.size ?? 0;
    if (key === AGENT_SLOT || meetsAgent(Number(gpa), Math.max(Number(size), moved)))
      return 'the memory of the guest agent';
  }
  if (step.slot === AGENT_SLOT) return 'the slot of the guest agent';
  return isDangerous(step, mirror, kernel) ? 'toggling GUEST_MEMFD, or binding beyond 2^63' : null;
}

/**
 * The boundary answers these itself and sends them to no kernel. On a kernel that would suffer from them this list does not rely on that:
 * before 6.19 the toggle is a use-after-free, before 7.2 the binding is accepted.
 */
function isDangerous(step: SetRegion, mirror: Mirror, kernel: Kernel): boolean {
  if (kernel.name === 'software') return false;
  const size = BigInt(mirror.valueIn(step, step.size));
  if (size === 0n) return false;
  const binds = (step.flags & KVM_MEM_GUEST_MEMFD) !== 0;
  const slot = mirror.vm(step.vm)?.slots.get(slotKey(step));
  if (slot) {
    const toggles = binds || (slot.flags & KVM_MEM_GUEST_MEMFD) !== 0;
    return toggles && compareVersions(kernel.release, '7.2') < 0;
  }
  if (!binds || step.call === 'setUserMemoryRegion') return false;
  // On no kernel: the boundary answers from limits it assumes, so there is nothing to compare.
  return BigInt(mirror.valueIn(step, step.offset)) + size >= 1n << 63n;
}

function excludedAccess(step: ByGuest, mirror: Mirror, kernel: Kernel): string | null {
  const vm = mirror.agentVm(step.vm);
  if (!vm) return 'a guest without a VM';
  if (vm.unfit) return vm.unfit;
  if (kernel.arch === 'x86_64' && step.page * mirror.facts.page >= CANONICAL)
    return 'an address that no identity map has';
  if (meetsAgent(step.page * mirror.facts.page, mirror.facts.page)) return 'the memory of the guest agent';
  if (!vm.hasAgent && [...vm.slots.values()].some((slot) => slot.id === AGENT_SLOT || meetsAgent(slot.gpa, slot.size)))
    return 'the memory of the guest agent';
  // KVM remembers on x86 that nothing was there, and misses that the page has become private. Contract §13.4.
  return vm.mmio.has(step.page) && vm.type === 1 ? 'a page remembered as MMIO' : null;
}

function meetsAgent(start: number, size: number): boolean {
  const meets = (from: number, to: number): boolean => start < to && start + size > from;
  return meets(AGENT_FROM, AGENT_TO) || meets(DOORBELL_FROM, DOORBELL_TO);
}

function pagesOf(bytes: number | bigint, mirror: Mirror): number {
  return Number(bytes) / mirror.facts.page;
}
