import type { ModelOptions } from '../../lib/model_options.ts';
import type { Program } from './program.ts';

/** A program on which the model and a real kernel once disagreed. They are kept, so that they never do again. */
export interface Counterexample {
  /** What is right, and the kernel that said so. */
  readonly found: string;
  /** What came back from the last step, on a model of that kernel. */
  readonly answer: string;
  /** That model; the newest when omitted. */
  readonly model?: ModelOptions;
  readonly program: Program;
}

const vm = { call: 'createVm', fd: 'kvm', type: 0 } as const;
const vcpu = { call: 'createVcpu', vm: 'vm0', id: 1 } as const;
const anonymous = { call: 'mmap', fd: 'none', length: 8, offset: 0, prot: 3, flags: 0x22 } as const;
const locked = { call: 'mlock', map: 0, from: 0, length: 1 } as const;
const page0 = { slot: 0, flags: 0, gpa: 0, size: 1, hva: { mapping: 0, page: 0 } } as const;
const memfd = { call: 'memfdCreate', flags: 0 } as const;

export const counterexamples: readonly Counterexample[] = [
  {
    found: '7.3.4 x86: a vCPU fd says EINVAL to a VM request (contract §2.2)',
    answer: 'EINVAL',
    program: [vm, vcpu, { call: 'createGuestMemfd', vm: 'vcpu0', size: 1, flags: 0 }],
  },
  {
    found: '7.3.4 x86: /dev/kvm says EINVAL to a vCPU request',
    answer: '[EINVAL, 0, 0]',
    program: [{ call: 'preFaultMemory', vcpu: 'kvm', gpa: 0, size: 0, flags: 0 }],
  },
  {
    found: '7.3.4 x86: the size of a dirty ring is 32 bits of the argument',
    answer: 'EINVAL',
    program: [vm, { call: 'enableCap', fd: 'vm0', cap: 223, flags: 0, value: ['2^63', 0] }],
  },
  {
    found: '7.3.4 arm64: vCPU ids end at 512, as many as a GICv3 serves',
    answer: 'EINVAL',
    model: { arch: 'aarch64' },
    program: [vm, { call: 'createVcpu', vm: 'vm0', id: 512 }],
  },
  {
    found: '7.3.4 x86: vCPU fds have no O_LARGEFILE',
    answer: '2',
    program: [vm, vcpu, { call: 'fcntl', fd: 'vcpu0', command: 3, argument: 0 }],
  },
  {
    found: '7.3.4 x86: lseek on a vCPU fd is 0',
    answer: '0',
    program: [vm, vcpu, { call: 'lseek', fd: 'vcpu0', offset: 0, whence: 0 }],
  },
  {
    found: '7.3.4 x86: a mapping of a first page and three more fits a slot below the end of the address space',
    answer: '0',
    program: [
      vm,
      { call: 'mmap', fd: 'none', length: 1, offset: 0, prot: 0, flags: 0x21 },
      {
        call: 'setUserMemoryRegion',
        vm: 'vm0',
        slot: 0,
        flags: 0,
        gpa: 0,
        size: 4,
        hva: { mapping: 0, page: 0 },
      },
    ],
  },
  {
    found: '7.3.4 x86: a file that cannot be mapped at all is EPERM first when it should be executed',
    answer: 'EPERM',
    program: [vm, { call: 'mmap', fd: 'vm0', length: 1, offset: 0, prot: 5, flags: 1 }],
  },
  {
    found: '7.3.4 x86: only regular files end at 2^63',
    answer: 'EINVAL',
    program: [{ call: 'mmap', fd: 'kvm', length: 1, offset: ['2^63', 0], prot: 0, flags: 0 }],
  },
  {
    found: '7.3.4 x86: MADV_COLD on locked memory is EINVAL',
    answer: 'EINVAL',
    program: [anonymous, locked, { call: 'madvise', map: 0, from: 0, length: 1, advice: 20 }],
  },
  {
    found: '7.3.4 x86: MS_INVALIDATE on locked memory is EBUSY',
    answer: 'EBUSY',
    program: [anonymous, locked, { call: 'msync', map: 0, from: 0, length: 1, flags: 2 }],
  },
  {
    found: '7.3.4 x86: MADV_GUARD_INSTALL drops the pages',
    answer: '0000',
    program: [
      anonymous,
      { call: 'poke', map: 0, from: 0, length: 1, value: 1 },
      { call: 'madvise', map: 0, from: 0, length: 1, advice: 102 },
      { call: 'mincore', map: 0, from: 0, length: 2 },
    ],
  },
  {
    found: '7.3.4 x86: MADV_POPULATE_READ stops with EINVAL where a later page may not be read',
    answer: 'EINVAL',
    program: [
      anonymous,
      { call: 'mprotect', map: 0, from: 3, length: 1, prot: 0 },
      { call: 'madvise', map: 0, from: 2, length: 2, advice: 22 },
    ],
  },
  {
    found: '7.3.4 x86: what KEEP_SIZE allocated behind the end of a memfd counts as blocks',
    answer: '[33279, 0, 8, 0]',
    program: [memfd, { call: 'fallocate', fd: 'file0', mode: 1, offset: 0, length: 1 }, { call: 'fstat', fd: 'file0' }],
  },
  {
    found:
      '7.3.4 x86: a pre-fault of memory that was only read, the zero page, is no write for the dirty log (contract §16)',
    answer: '0000000000000000',
    program: [
      vm,
      anonymous,
      vcpu,
      { call: 'peek', map: 0, from: 0, length: 1 },
      {
        call: 'setUserMemoryRegion',
        vm: 'vm0',
        slot: 0,
        flags: 1,
        gpa: 0,
        size: 1,
        hva: { mapping: 0, page: 0 },
      },
      { call: 'preFaultMemory', vcpu: 'vcpu0', gpa: 0, size: 1, flags: 0 },
      { call: 'getDirtyLog', vm: 'vm0', slot: 0, bytes: 8 },
    ],
  },
  {
    found: '7.3.4 x86: writing nothing does not grow a memfd',
    answer: '[33279, 0, 0, 0]',
    program: [memfd, { call: 'pwrite', fd: 'file0', offset: 1, bytes: 0 }, { call: 'fstat', fd: 'file0' }],
  },
  {
    found: '7.3.4 x86: mincore of a private mapping shows the pages of the file',
    answer: '01',
    program: [
      memfd,
      { call: 'ftruncate', fd: 'file0', length: 1 },
      { call: 'mmap', fd: 'file0', length: 1, offset: 0, prot: 1, flags: 1 },
      { call: 'mmap', fd: 'file0', length: 1, offset: 0, prot: 1, flags: 2 },
      { call: 'peek', map: 0, from: 0, length: 1 },
      { call: 'mincore', map: 1, from: 0, length: 1 },
    ],
  },
  {
    found: '7.3.4 x86: a memfd that is cut gives its last page back, though it held less than a page',
    answer: '[33279, 0, 0, 0]',
    program: [
      memfd,
      { call: 'write', fd: 'file0', bytes: 1 },
      { call: 'ftruncate', fd: 'file0', length: 0 },
      { call: 'fstat', fd: 'file0' },
    ],
  },
  {
    found: '7.3.4 x86: that a range leaves its mapping is said before an unknown advice',
    answer: 'ENOMEM',
    program: [{ call: 'madvise', map: 0, from: 0, length: 1, advice: 99 }],
  },
  {
    found: '7.3.4 x86: pages behind the end of a memfd go when its size is set to what it was',
    answer: '[33279, 0, 0, 0]',
    program: [
      memfd,
      { call: 'fallocate', fd: 'file0', mode: 1, offset: 0, length: 1 },
      { call: 'ftruncate', fd: 'file0', length: 0 },
      { call: 'fstat', fd: 'file0' },
    ],
  },
  {
    found: '7.3.4 x86: a memfd sealed against growing allocates nothing behind its end, with KEEP_SIZE neither',
    answer: 'EPERM',
    program: [
      { call: 'memfdCreate', flags: 2 },
      { call: 'fcntl', fd: 'file0', command: 1033, argument: 4 },
      { call: 'fallocate', fd: 'file0', mode: 1, offset: 0, length: 1 },
    ],
  },
  {
    found: '7.3.4 x86: whole pages of a memfd are allocated, and their end has to be an offset too',
    answer: 'EFBIG',
    program: [memfd, { call: 'fallocate', fd: 'file0', mode: 0, offset: ['2^63', -1], length: ['0', 0, 512] }],
  },
  {
    found: '7.3.4 x86: a page of a memfd that is allocated twice is resident',
    answer: '01',
    program: [
      memfd,
      { call: 'fallocate', fd: 'file0', mode: 0, offset: 0, length: 1 },
      { call: 'fallocate', fd: 'file0', mode: 0, offset: 0, length: 1 },
      { call: 'mmap', fd: 'file0', length: 1, offset: 0, prot: 0, flags: 1 },
      { call: 'mincore', map: 0, from: 0, length: 1 },
    ],
  },
  {
    found:
      '7.3.4 x86: a page of zeros that a guest has read is mapped anew, and writable, once the host has written it',
    answer: '0100000000000000eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee',
    program: [
      { call: 'createVm', fd: 'kvm', type: 0 },
      { call: 'mmap', fd: 'none', length: 8, offset: 0, prot: 3, flags: 34 },
      { call: 'createVcpu', vm: 'vm0', id: 1 },
      {
        ...{ call: 'setUserMemoryRegion2', vm: 'vm0', slot: 0, space: 0, flags: 1, gpa: 0, size: 1 },
        ...{ hva: { mapping: 0, page: 0 }, file: 'none', offset: 0 },
      },
      { call: 'preFaultMemory', vcpu: 'vcpu0', gpa: 0, size: 1, flags: 0 },
      { call: 'poke', map: 0, from: 0, length: 1, value: 0 },
      { call: 'preFaultMemory', vcpu: 'vcpu0', gpa: 0, size: 1, flags: 0 },
      { call: 'getDirtyLog', vm: 'vm0', slot: 0, bytes: 32 },
    ],
  },
  {
    found: '6.12.117 x86: a guest_memfd that no mmap(2) knows is ENODEV, before the flags are looked at',
    answer: 'ENODEV',
    model: { kernel: '6.11' },
    program: [
      { call: 'createVm', fd: 'kvm', type: 0 },
      { call: 'createGuestMemfd', vm: 'vm0', size: 4, flags: 0 },
      { call: 'mmap', fd: 'file0', length: 1, offset: 0, prot: 0, flags: 0x101 },
    ],
  },
  {
    found: '6.12.117 x86: there are no guard pages before 6.13',
    answer: 'EINVAL',
    model: { kernel: '6.11' },
    program: [anonymous, { call: 'madvise', map: 0, from: 0, length: 0, advice: 102 }],
  },
  {
    found: '6.12.117 x86: KVM has its files where programs may be executed, so that the one reason is ENODEV',
    answer: 'ENODEV',
    model: { kernel: '6.11' },
    program: [
      { call: 'createVm', fd: 'kvm', type: 0 },
      { call: 'createGuestMemfd', vm: 'vm0', size: 4, flags: 0 },
      { call: 'mmap', fd: 'file0', length: 1, offset: 0, prot: 4, flags: 1 },
    ],
  },
  {
    found: '6.12.117 x86: no file can WRITE_ZEROES before 6.17',
    answer: 'EOPNOTSUPP',
    model: { kernel: '6.11' },
    program: [vm, { call: 'fallocate', fd: 'vm0', mode: 128, offset: 0, length: 1 }],
  },
  {
    found: '6.18.44 without hardware paging: a VM that never had a memslot has no room for page tables',
    answer: '[ENOSPC, 0, 4096]',
    model: { kernel: '6.18', tdp: false },
    program: [vm, vcpu, { call: 'preFaultMemory', vcpu: 'vcpu0', gpa: 0, size: 1, flags: 0 }],
  },
  {
    found: '7.3.4 pKVM: what an ordinary guest has mapped, a protected one cannot take',
    answer: '[EPERM, 0]',
    model: { arch: 'aarch64', pkvm: true },
    program: [
      vm,
      { call: 'createVm', fd: 'kvm', type: ['2^31', 0] },
      anonymous,
      { call: 'setUserMemoryRegion', ...page0, vm: 'vm0' },
      { call: 'guestWrite', vm: 'vm0', page: 0, value: 1 },
      { call: 'setUserMemoryRegion', ...page0, vm: 'vm1' },
      { call: 'guestRead', vm: 'vm1', page: 0 },
    ],
  },
  {
    found: '7.3.4 pKVM: the host can lock a page that a protected guest has, for nothing looks at its bytes',
    answer: '0',
    model: { arch: 'aarch64', pkvm: true },
    program: [
      { call: 'createVm', fd: 'kvm', type: ['2^31', 0] },
      anonymous,
      { call: 'setUserMemoryRegion', ...page0, vm: 'vm0' },
      { call: 'guestRead', vm: 'vm0', page: 0 },
      { call: 'mlock', map: 0, from: 0, length: 1 },
    ],
  },
  {
    found: '7.3.4 x86: pages beside a locked one that were only read are the page of zeros',
    answer: '0100000000000000eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee',
    program: [
      vm,
      anonymous,
      vcpu,
      locked,
      { call: 'setUserMemoryRegion', ...page0, size: 2, flags: 1, vm: 'vm0' },
      { call: 'madvise', map: 0, from: 0, length: 2, advice: 22 },
      { call: 'preFaultMemory', vcpu: 'vcpu0', gpa: 0, size: 2, flags: 0 },
      { call: 'getDirtyLog', vm: 'vm0', slot: 0, bytes: 32 },
    ],
  },
];
