import {
  KVM_CAP,
  KVM_CLEAR_DIRTY_LOG,
  KVM_CREATE_GUEST_MEMFD,
  KVM_CREATE_VM,
  KVM_ENABLE_CAP,
  KVM_GET_API_VERSION,
  KVM_GET_DIRTY_LOG,
  KVM_GET_VCPU_MMAP_SIZE,
  KVM_SET_MEMORY_ATTRIBUTES,
  KVM_SET_USER_MEMORY_REGION,
  KVM_SET_USER_MEMORY_REGION2,
  KVM_VM_TYPE_ARM_PROTECTED,
} from '../../../lib/uapi.ts';
import { createVmWithoutFds, useKvm, useVm } from '../child_programs.ts';
import {
  arm64,
  attributes,
  before,
  dirtyRing,
  gmemOnDefaultVm,
  noAttributes,
  noProtectedVm,
  noSwProtected,
  noTdp,
  ordinaryHost,
  protectedHost,
  protectedVm,
  ringAcqRel,
  shareable,
  since,
  smm,
  swProtected,
  tdp,
  x86,
} from '../needs.ts';
import { type Case, type Scenario, scenario, section } from '../scenario.ts';

const UNKNOWN = 0xaeff;
const vmRequests = [
  KVM_SET_USER_MEMORY_REGION,
  KVM_SET_USER_MEMORY_REGION2,
  KVM_CREATE_GUEST_MEMFD,
  KVM_ENABLE_CAP,
  KVM_GET_DIRTY_LOG,
  KVM_CLEAR_DIRTY_LOG,
];

const createVms = (s: Scenario, ...types: (number | bigint)[]) => types.map((type) => s.createVm(type));
const caps = (s: Scenario, fd: number, ...names: (keyof typeof KVM_CAP)[]) => names.map((name) => s.cap(fd, name));
const ipaLimit = (s: Scenario) => s.cap(s.kvm, 'ARM_VM_IPA_SIZE');

export const dispatch = section('Rules common to every KVM fd', [
  scenario('2 rule 1', 'in another process, every ioctl on the VM fd is EIO before anything is looked at', {
    given: (s) => s.vm(),
    when: (s, vm) => s.inChild(useVm, [vm]),
    expect: ['EIO', 'EIO', 'EIO', 'EIO'],
  }),
  scenario('2 rule 1 /dev/kvm', 'another process may use an inherited /dev/kvm', {
    when: (s) => s.inChild(useKvm, [s.kvm]),
    expect: [1, 12, 'ok'],
  }),
  scenario(19, 'an unknown request on a VM fd is ENOTTY on x86, EINVAL on arm64', {
    given: (s) => s.vm(),
    when: (s, vm) => s.kernel.ioctl(vm, UNKNOWN, 0),
    expect: { x86_64: 'ENOTTY', aarch64: 'EINVAL' },
  }),
  scenario(20, 'an unknown request on /dev/kvm is EINVAL', {
    when: (s) => s.kernel.ioctl(s.kvm, UNKNOWN, 0),
    expect: 'EINVAL',
  }),
  scenario(21, 'any KVM request on a guest_memfd is ENOTTY', {
    given: (s) => s.gmem(s.vm()),
    when: (s, file) => [UNKNOWN, KVM_GET_API_VERSION, ...vmRequests].map((r) => s.kernel.ioctl(file, r, 0)),
    expect: ['ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY'],
  }),
  scenario('2 rule 5', 'a VM request on /dev/kvm is unknown there', {
    when: (s) => [
      ...vmRequests.map((request) => s.kernel.ioctl(s.kvm, request, 0)),
      s.createGmem(s.kvm, s.P),
      s.slot(s.kvm),
      s.enable(s.kvm, KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2, 0),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('2 rule 2', 'a request of /dev/kvm is unknown on a VM fd', {
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.kernel.ioctl(vm, KVM_CREATE_VM, 0),
      s.kernel.ioctl(vm, KVM_GET_API_VERSION, 0),
      s.kernel.createVm(vm, 0),
      s.kernel.getApiVersion(vm),
      s.kernel.getVcpuMmapSize(vm),
    ],
    expect: { x86_64: Array(5).fill('ENOTTY'), aarch64: Array(5).fill('EINVAL') },
  }),
  scenario('2 rule 3', 'a NULL struct is EFAULT for every VM request', {
    given: (s) => s.vm(),
    when: (s, vm) => vmRequests.map((request) => s.kernel.ioctl(vm, request, 0)),
    expect: ['EFAULT', 'EFAULT', 'EFAULT', 'EFAULT', 'EFAULT', 'EFAULT'],
  }),
  scenario('2 rule 2 attributes', 'attributes that are not built are an unknown request, even for a NULL pointer', {
    needs: [noAttributes],
    given: (s) => s.vm(),
    when: (s, vm) => [s.kernel.ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, 0), s.setAttributes(vm, 0, s.P, 0)],
    expect: { x86_64: ['ENOTTY', 'ENOTTY'], aarch64: ['EINVAL', 'EINVAL'] },
  }),
  scenario(22, 'GET_API_VERSION is 12, and EINVAL with an argument', {
    when: (s) => [s.kernel.getApiVersion(s.kvm), s.kernel.ioctl(s.kvm, KVM_GET_API_VERSION, 1)],
    expect: [12, 'EINVAL'],
  }),
  scenario('1.1 mmap size', 'GET_VCPU_MMAP_SIZE is three pages on x86, two on arm64, and EINVAL with an argument', {
    when: (s) => [s.kernel.getVcpuMmapSize(s.kvm), s.kernel.ioctl(s.kvm, KVM_GET_VCPU_MMAP_SIZE, 1)],
    expect: (s) => ({ x86_64: [12288, 'EINVAL'], aarch64: [2 * s.P, 'EINVAL'] }),
  }),
  scenario('2 fds', 'a request on a file that is not KVM’s is ENOTTY, on a closed fd EBADF', {
    given: (s) => ({ file: s.memfd(), closed: s.vm() }),
    when: (s, { file, closed }) => [
      s.kernel.checkExtension(file, 3),
      s.createGmem(file, s.P),
      s.slot(file),
      s.setAttributes(file, 0, s.P),
      s.kernel.getApiVersion(file),
      s.kernel.createVm(file, 0),
      s.closeFd(closed),
      s.kernel.checkExtension(closed, 3),
      s.createGmem(closed, s.P),
      s.slot(closed),
      s.closeFd(closed),
    ],
    expect: ['ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 'ENOTTY', 0, 'EBADF', 'EBADF', 'EBADF', 'EBADF'],
  }),
]);

export const createVm = section('KVM_CREATE_VM', [
  scenario(1, 'a default VM: an fd that closes on exec', {
    given: (s) => s.vm(),
    when: (s, vm) => s.closesOnExec(vm),
    expect: true,
  }),
  scenario(2, 'without SW_PROTECTED, type 1 is EINVAL', {
    needs: [x86, noSwProtected],
    when: (s) => s.createVm(1),
    expect: 'EINVAL',
  }),
  scenario(3, 'with SW_PROTECTED, type 1 is an fd that closes on exec', {
    needs: [swProtected],
    given: (s) => s.vm(1),
    when: (s, vm) => s.closesOnExec(vm),
    expect: true,
  }),
  scenario(4, 'types that do not exist are EINVAL, over the whole unsigned long', {
    needs: [x86],
    when: (s) => createVms(s, 6, 31, 32, 0x80000000, 1n << 32n, -1, 2n ** 64n - 1n, 1n << 63n),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(5, 'without a free fd it is EMFILE, before the type is examined', {
    when: (s) => s.inChild(createVmWithoutFds, [], { descriptors: 64 }),
    expect: ['EMFILE', 'EMFILE'],
  }),
  scenario(6, 'arm64: an IPA size from 32 bits to the host’s limit, or 0', {
    needs: [arm64, ordinaryHost],
    when: (s) => createVms(s, 0, 32, 36, 40, ipaLimit(s), 1, 31, ipaLimit(s) + 1, 255),
    expect: ['ok', 'ok', 'ok', 'ok', 'ok', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(7, 'arm64: bits outside 0x800000ff are EINVAL', {
    needs: [arm64],
    when: (s) => createVms(s, 0x100, 0x40000000, 1n << 32n, -1, 0x128),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario(8, 'arm64: a protected VM on an ordinary host is EINVAL', {
    needs: [arm64, noProtectedVm],
    when: (s) => createVms(s, 0x80000000, 0x80000028),
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario(9, 'arm64: a protected host creates protected VMs, whatever the IPA byte', {
    needs: [protectedVm],
    when: (s) => createVms(s, 0x80000000, 0x80000001, 0x80000028, 0x80000100, 0x80000000n | (1n << 32n)),
    expect: ['ok', 'ok', 'ok', 'EINVAL', 'EINVAL'],
  }),
  scenario(10, 'arm64: a protected host ignores the IPA byte of ordinary VMs too', {
    needs: [arm64, protectedHost],
    when: (s) => createVms(s, 1, 0x38, 31, 255, 0, 40),
    expect: ['ok', 'ok', 'ok', 'ok', 'ok', 'ok'],
  }),
]);

export const checkExtension = section('KVM_CHECK_EXTENSION', [
  scenario(11, 'a default VM has guest_memfd with both flags', {
    needs: [x86, since('6.18')],
    given: (s) => s.vm(),
    when: (s, vm) => caps(s, vm, 'USER_MEMORY2', 'MEMORY_FAULT_INFO', 'GUEST_MEMFD', 'GUEST_MEMFD_FLAGS'),
    expect: [1, 1, 1, 3],
  }),
  scenario('4 before 6.18', 'a default VM had no guest_memfd and no flags', {
    needs: [x86, before('6.18')],
    given: (s) => s.vm(),
    when: (s, vm) => caps(s, vm, 'USER_MEMORY2', 'MEMORY_FAULT_INFO', 'GUEST_MEMFD', 'GUEST_MEMFD_FLAGS'),
    expect: [1, 1, 0, 0],
  }),
  scenario(12, 'a SW_PROTECTED VM has guest_memfd and attributes, no INIT_SHARED and one address space', {
    needs: [swProtected],
    given: (s) => s.vm(1),
    when: (s, vm) =>
      caps(
        s,
        vm,
        'USER_MEMORY2',
        'MEMORY_FAULT_INFO',
        'GUEST_MEMFD',
        'GUEST_MEMFD_FLAGS',
        'MEMORY_ATTRIBUTES',
        'READONLY_MEM',
      ),
    expect: { since: { '6.18': [1, 1, 1, 1, 8, 1] }, before: [1, 1, 1, 0, 8, 1] },
  }),
  scenario('12 address spaces', 'a SW_PROTECTED VM has one address space where a default VM has two', {
    needs: [swProtected, smm],
    when: (s) => caps(s, s.vm(1), 'MULTI_ADDRESS_SPACE'),
    expect: [1],
  }),
  scenario(13, 'attributes that are built: 8 on /dev/kvm, 0 on a default VM', {
    needs: [x86, attributes],
    when: (s) => [s.cap(s.kvm, 'MEMORY_ATTRIBUTES'), s.cap(s.vm(), 'MEMORY_ATTRIBUTES')],
    expect: [8, 0],
  }),
  scenario(14, 'attributes that are not built: 0 on /dev/kvm and on a VM', {
    needs: [noAttributes],
    when: (s) => [s.cap(s.kvm, 'MEMORY_ATTRIBUTES'), s.cap(s.vm(), 'MEMORY_ATTRIBUTES')],
    expect: [0, 0],
  }),
  scenario(15, 'arm64 has guest_memfd, and says nothing of memory faults, VM types or pre-faulting', {
    needs: [arm64, since('6.18')],
    given: (s) => s.vm(),
    when: (s, vm) =>
      [s.kvm, vm].map((fd) =>
        caps(
          s,
          fd,
          'USER_MEMORY2',
          'MEMORY_FAULT_INFO',
          'MEMORY_ATTRIBUTES',
          'GUEST_MEMFD',
          'VM_TYPES',
          'PRE_FAULT_MEMORY',
          'GUEST_MEMFD_FLAGS',
          'MULTI_ADDRESS_SPACE',
          'EXIT_HYPERCALL',
        ),
      ),
    expect: [
      [1, 0, 0, 1, 0, 0, 3, 0, 0],
      [1, 0, 0, 1, 0, 0, 3, 0, 0],
    ],
  }),
  scenario(16, 'a protected VM has no READONLY slots, but guest_memfd with both flags', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) =>
      caps(s, vm, 'READONLY_MEM', 'GUEST_MEMFD', 'GUEST_MEMFD_FLAGS', 'MANUAL_DIRTY_LOG_PROTECT2', 'USER_MEMORY2'),
    expect: [0, 1, 3, 3, 1],
  }),
  scenario(17, 'a capability nobody knows is 0', {
    given: (s) => s.vm(),
    when: (s, vm) => [s.kvm, vm].flatMap((fd) => [99999, -1, 1 << 30].map((cap) => s.kernel.checkExtension(fd, cap))),
    expect: [0, 0, 0, 0, 0, 0],
  }),
  scenario(18, 'what every kernel here has, on /dev/kvm and on a VM', {
    given: (s) => s.vm(),
    when: (s, vm) =>
      [s.kvm, vm].map((fd) =>
        caps(s, fd, 'USER_MEMORY', 'SYNC_MMU', 'READONLY_MEM', 'CHECK_EXTENSION_VM', 'MANUAL_DIRTY_LOG_PROTECT2'),
      ),
    expect: [
      [1, 1, 1, 1, 3],
      [1, 1, 1, 1, 3],
    ],
  }),
  scenario('4 NR_MEMSLOTS', 'user slots: 32764 on x86, 32767 on arm64', {
    given: (s) => s.vm(),
    when: (s, vm) => [s.cap(s.kvm, 'NR_MEMSLOTS'), s.cap(vm, 'NR_MEMSLOTS')],
    expect: { x86_64: [32764, 32764], aarch64: [32767, 32767] },
  }),
  scenario('4 GUEST_MEMFD', '/dev/kvm says what some VM type can do', {
    needs: [gmemOnDefaultVm],
    when: (s) => caps(s, s.kvm, 'GUEST_MEMFD', 'GUEST_MEMFD_FLAGS'),
    expect: [1, 3],
  }),
  scenario('4 VM_TYPES', 'the mask of VM types names those that can be created', {
    needs: [x86],
    given: (s) => ({ vm: s.vm(), one: s.createVm(1) >= 0 }),
    when: (s, { vm, one }) => [
      (s.cap(s.kvm, 'VM_TYPES') & 3) === (one ? 3 : 1),
      s.cap(vm, 'VM_TYPES') === s.cap(s.kvm, 'VM_TYPES'),
    ],
    expect: [true, true],
  }),
  scenario('4 EXIT_HYPERCALL', 'MAP_GPA_RANGE is the one hypercall that can exit', {
    needs: [x86],
    when: (s) => [s.cap(s.kvm, 'EXIT_HYPERCALL'), s.cap(s.vm(), 'EXIT_HYPERCALL')],
    expect: [0x1000, 0x1000],
  }),
  scenario('4 PRE_FAULT_MEMORY', 'pre-faulting exists since 6.11, with TDP', {
    needs: [x86, tdp],
    when: (s) => [s.since('6.11'), s.cap(s.kvm, 'PRE_FAULT_MEMORY'), s.cap(s.vm(), 'PRE_FAULT_MEMORY')],
    expect: [true, 1, 1],
  }),
  scenario('4 PRE_FAULT_MEMORY before 6.11', 'pre-faulting did not exist before 6.11', {
    needs: [x86, before('6.11')],
    when: (s) => [s.cap(s.kvm, 'PRE_FAULT_MEMORY'), s.cap(s.vm(), 'PRE_FAULT_MEMORY')],
    expect: [0, 0],
  }),
  scenario('4 PRE_FAULT_MEMORY off', 'without TDP there is neither pre-faulting nor a SW_PROTECTED VM', {
    needs: [x86, noTdp],
    when: (s) => [s.cap(s.vm(), 'PRE_FAULT_MEMORY'), s.createVm(1)],
    expect: [0, 'EINVAL'],
  }),
  scenario('4 DIRTY_LOG_RING', 'x86 has both dirty rings of 1 MiB and no bitmap beside them', {
    needs: [x86, dirtyRing],
    when: (s) => caps(s, s.vm(), 'DIRTY_LOG_RING', 'DIRTY_LOG_RING_ACQ_REL', 'DIRTY_LOG_RING_WITH_BITMAP'),
    expect: [1048576, 1048576, 0],
  }),
  scenario('4 DIRTY_LOG_RING arm64', 'arm64 has the ACQ_REL dirty ring, with a bitmap', {
    needs: [arm64, ringAcqRel],
    when: (s) => caps(s, s.vm(), 'DIRTY_LOG_RING', 'DIRTY_LOG_RING_ACQ_REL', 'DIRTY_LOG_RING_WITH_BITMAP'),
    expect: [0, 1048576, 1],
  }),
  scenario('4 shareable', 'both flags of guest_memfd come together', {
    needs: [shareable],
    when: (s) => s.cap(s.vm(), 'GUEST_MEMFD_FLAGS'),
    expect: 3,
  }),
]);

// ── KVM_ENABLE_CAP
const {
  MANUAL_DIRTY_LOG_PROTECT2,
  EXIT_HYPERCALL,
  DIRTY_LOG_RING,
  DIRTY_LOG_RING_ACQ_REL,
  DIRTY_LOG_RING_WITH_BITMAP,
} = KVM_CAP;

const ring = (name: string, cap: number, needs: Case['needs']): Case[] => [
  scenario(`5 ${name} size`, 'a dirty ring is a power of two bytes, at least a page, at most 65536 entries', {
    needs,
    given: (s) => s.vm(),
    when: (s, vm) => [3 * s.P, s.P / 2, 0, 3 << 20, 2 << 20, 1 << 20].map((size) => s.enable(vm, cap, size)),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'E2BIG', 0],
  }),
  scenario(`5 ${name} twice`, 'a dirty ring can be set once', {
    needs,
    given: (s) => s.vm(),
    when: (s, vm) => [1 << 16, 1 << 16, 0, 2 << 20].map((size) => s.enable(vm, cap, size)),
    expect: [0, 'EINVAL', 'EINVAL', 'E2BIG'],
  }),
];

export const enableCap = section('KVM_ENABLE_CAP', [
  scenario(223, 'x86: EXIT_HYPERCALL takes 0x1000 or 0, nothing else and no flags', {
    needs: [x86],
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.enable(vm, EXIT_HYPERCALL, 0x1000),
      s.enable(vm, EXIT_HYPERCALL, 0),
      s.enable(vm, EXIT_HYPERCALL, 0x1001),
      s.enable(vm, EXIT_HYPERCALL, 1n << 63n),
      s.enable(vm, EXIT_HYPERCALL, 0x1000, 1),
    ],
    expect: [0, 0, 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('223 type 1', 'EXIT_HYPERCALL works on a SW_PROTECTED VM', {
    needs: [swProtected],
    given: (s) => s.vm(1),
    when: (s, vm) => [s.enable(vm, EXIT_HYPERCALL, 0x1000), s.enable(vm, EXIT_HYPERCALL, 0)],
    expect: [0, 0],
  }),
  scenario(224, 'arm64: EXIT_HYPERCALL is EINVAL', {
    needs: [arm64],
    given: (s) => s.vm(),
    when: (s, vm) => [s.enable(vm, EXIT_HYPERCALL, 0x1000), s.enable(vm, EXIT_HYPERCALL, 0)],
    expect: ['EINVAL', 'EINVAL'],
  }),
  scenario('5 manual', 'MANUAL_DIRTY_LOG_PROTECT2 takes 0, 1 and 3, back and forth, and no flags', {
    given: (s) => s.vm(),
    when: (s, vm) => [
      ...[1, 3, 0, 3, 1, 2, 4, 7, 1n << 32n].map((value) => s.enable(vm, MANUAL_DIRTY_LOG_PROTECT2, value)),
      s.enable(vm, MANUAL_DIRTY_LOG_PROTECT2, 1, 1),
    ],
    expect: [0, 0, 0, 0, 0, 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('5 manual pVM', 'MANUAL_DIRTY_LOG_PROTECT2 works on a protected VM', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [3, 0].map((value) => s.enable(vm, MANUAL_DIRTY_LOG_PROTECT2, value)),
    expect: [0, 0],
  }),
  scenario('5 unknown', 'a capability that cannot be enabled is EINVAL', {
    given: (s) => s.vm(),
    when: (s, vm) =>
      [99999, KVM_CAP.MEMORY_ATTRIBUTES, KVM_CAP.GUEST_MEMFD, KVM_CAP.USER_MEMORY].map((cap) => s.enable(vm, cap, 1)),
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  ...ring('DIRTY_LOG_RING', DIRTY_LOG_RING, [dirtyRing]),
  ...ring('DIRTY_LOG_RING_ACQ_REL', DIRTY_LOG_RING_ACQ_REL, [ringAcqRel]),
  scenario('5 bitmap', 'x86 has no bitmap beside the dirty ring', {
    needs: [dirtyRing],
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.enable(vm, DIRTY_LOG_RING_WITH_BITMAP, 0),
      s.enable(vm, DIRTY_LOG_RING, 1 << 16),
      s.enable(vm, DIRTY_LOG_RING_WITH_BITMAP, 0),
    ],
    expect: ['EINVAL', 0, 'EINVAL'],
  }),
  scenario('5 bitmap arm64', 'arm64: a bitmap beside the dirty ring, after the ring and before the first slot', {
    needs: [arm64, ringAcqRel],
    given: (s) => ({ vm: s.vm(), late: s.vm() }),
    when: (s, { vm, late }) => [
      s.enable(vm, DIRTY_LOG_RING_WITH_BITMAP, 0),
      s.enable(vm, DIRTY_LOG_RING_ACQ_REL, 1 << 16),
      s.enable(vm, DIRTY_LOG_RING_WITH_BITMAP, 0),
      s.slot(vm, { flags: 1 }),
      s.dirty(vm, 0),
      s.dirty(vm, 9),
      s.enable(late, DIRTY_LOG_RING_ACQ_REL, 1 << 16),
      s.slot(late),
      s.enable(late, DIRTY_LOG_RING_WITH_BITMAP, 0),
    ],
    expect: ['EINVAL', 0, 0, 0, Array(8).fill(0), 'ENOENT', 0, 0, 'EINVAL'],
  }),
  scenario('5 DIRTY_LOG_RING arm64', 'arm64 has no DIRTY_LOG_RING without ACQ_REL', {
    needs: [arm64],
    given: (s) => s.vm(),
    when: (s, vm) => s.enable(vm, DIRTY_LOG_RING, 1 << 16),
    expect: 'EINVAL',
  }),
]);
