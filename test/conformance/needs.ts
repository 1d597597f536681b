import {
  KVM_VM_TYPE_ARM_PROTECTED,
  MADV_HUGEPAGE,
  MADV_MERGEABLE,
  MPOL_DEFAULT,
  MPOL_LOCAL,
  UFFD_FEATURE_WP_ASYNC,
} from '../../lib/uapi.ts';
import { compareVersions, INIT_SHARED, MMAP, matches, type Need, type Scenario } from './scenario.ts';

function need(missing: string, met: (s: Scenario) => boolean): Need {
  return { missing, met };
}

export const x86 = need('not x86_64', (s) => s.kernel.arch === 'x86_64');
export const arm64 = need('not aarch64', (s) => s.kernel.arch === 'aarch64');
export const pages4k = need('pages are not 4 KiB', (s) => s.P === 4096);

export const since = (version: string): Need => need(`older than ${version}`, (s) => s.since(version));
/** Before this version: the last ones that have the behaviour are older. */
export const before = (version: string): Need =>
  need(`not older than ${version}`, (s) => compareVersions(s.kernel.release, version) < 0);

// ── VM types. Where there is another sign of a thing than the call a case tests, the need asks for that: a call that is
// broken must not make its own case inapplicable.
const canCreate = (type: number) => (s: Scenario) => s.createVm(type) >= 0;
const listsType1 = (s: Scenario) => (s.cap(s.kvm, 'VM_TYPES') & 2) !== 0;
export const swProtected = need('no SW_PROTECTED VM', listsType1);
export const noSwProtected = need('SW_PROTECTED VMs exist', (s) => !listsType1(s));
/** A protected host gives no VM the IPA size it asks for, not even an impossible one. */
export const protectedVm = need(
  'no protected VM',
  (s) => s.kernel.arch === 'aarch64' && s.since('7.1') && canCreate(1)(s),
);
export const noProtectedVm = need('a protected host', (s) => !canCreate(1)(s));
export const protectedHost = need('not a protected host', canCreate(KVM_VM_TYPE_ARM_PROTECTED));
export const ordinaryHost = need('a protected host', (s) => !canCreate(KVM_VM_TYPE_ARM_PROTECTED)(s));

// ── what KVM_CHECK_EXTENSION says
export const attributes = need('attributes not built', (s) => s.cap(s.kvm, 'MEMORY_ATTRIBUTES') === 8);
export const noAttributes = need('attributes are built', (s) => s.cap(s.kvm, 'MEMORY_ATTRIBUTES') === 0);
export const tdp = need('no TDP', (s) => s.cap(s.kvm, 'PRE_FAULT_MEMORY') === 1);
export const noTdp = need('TDP, or no way to tell', (s) => s.since('6.11') && s.cap(s.kvm, 'PRE_FAULT_MEMORY') === 0);
/** The guest's accesses go through page tables of the CPU's own. Before 6.11 only SW_PROTECTED VMs tell, which need it. */
export const hardwarePaging = need(
  'no hardware paging for guests',
  (s) => s.kernel.arch === 'aarch64' || s.cap(s.kvm, 'PRE_FAULT_MEMORY') === 1 || listsType1(s),
);
/** KVM carries out all guest code itself: then a page without host memory is MMIO. Contract §13.6. */
export const emulated = need('guest code is not emulated', (s) => {
  if (!noTdp.met(s) || s.kernel.arch === 'aarch64') return false;
  const vm = s.vm();
  s.slot(vm);
  return matches(s.guest(vm).get(0), ['MMIO read', 0]);
});
export const logsWritesOnly = need('TDP, which logs some reads', (s) => s.kernel.arch === 'aarch64' || noTdp.met(s));
export const smm = need('no SMM address space', (s) => s.cap(s.vm(), 'MULTI_ADDRESS_SPACE') === 2);
export const gmemOnDefaultVm = need('no guest_memfd on a default VM', (s) => s.cap(s.vm(), 'GUEST_MEMFD') === 1);
export const gmemSlots = need(
  'no VM whose slots take a guest_memfd',
  (s) => s.cap(s.vm(), 'GUEST_MEMFD') === 1 || listsType1(s),
);
const gmemFlag = (flag: number) => (s: Scenario) => (s.cap(s.vm(), 'GUEST_MEMFD_FLAGS') & flag) !== 0;
export const mappable = need('no guest_memfd flag MMAP', gmemFlag(MMAP));
export const shareable = need('no guest_memfd flag INIT_SHARED', gmemFlag(MMAP | INIT_SHARED));
export const noGmemFlags = need('guest_memfd has flags', (s) => s.cap(s.vm(), 'GUEST_MEMFD_FLAGS') === 0);
export const dirtyRing = need('no dirty ring', (s) => s.cap(s.kvm, 'DIRTY_LOG_RING') > 0);
export const ringAcqRel = need('no dirty ring (ACQ_REL)', (s) => s.cap(s.kvm, 'DIRTY_LOG_RING_ACQ_REL') > 0);

// ── the rest of the kernel, tried on ordinary memory
export const numa = need(
  'no NUMA policies',
  (s) =>
    s.kernel.mbind(s.anonymous(1), 0, s.P, MPOL_LOCAL, []) === 0 &&
    s.kernel.mbind(s.anonymous(1), 0, s.P, MPOL_DEFAULT, []) === 0,
);
export const hugePages = need('no transparent huge pages', (s) => s.advise(s.anonymous(1), 0, 1, MADV_HUGEPAGE) === 0);
export const samePageMerging = need('no KSM', (s) => s.advise(s.anonymous(1), 0, 1, MADV_MERGEABLE) === 0);
export const userfaultfd = need('no userfaultfd', (s) => s.userfaultfd() >= 0);
export const asyncWriteProtect = need('no userfaultfd WP_ASYNC', (s) => {
  const uffd = s.userfaultfd();
  return uffd >= 0 && s.kernel.uffdioApi(uffd, UFFD_FEATURE_WP_ASYNC) === 0;
});
/** Two needs ask which backend it is. A modelled page cannot end the process, and modelled memory has one buffer for all its windows. */
export const realMemory = need('modelled memory raises no signals', (s) => s.kernel.name === 'linux');
export const separateWindows = need('windows of one memory share their buffer', (s) => s.kernel.name === 'linux');
/** And two what runs there: a model runs the guest agent only, and remembers no MMIO. */
export const machineCode = need(
  'the model runs no machine code',
  (s) => s.kernel.name === 'linux' && s.kernel.arch === 'x86_64',
);
export const mmioCache = need('the model remembers no MMIO', (s) => s.kernel.name === 'linux');
/** What no model can have. */
export const needRealKernel: readonly Need[] = [realMemory, separateWindows, machineCode, mmioCache];
