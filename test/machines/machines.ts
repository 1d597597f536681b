import type { Arch } from '../../lib/model_options.ts';

/** A computer under QEMU, without hardware help: TCG emulates also what KVM needs. */
export interface Machine {
  readonly name: string;
  readonly what: string;
  readonly arch: Arch;
  /** Which of Debian's kernels: the newest of trixie-backports, or that of a version. */
  readonly series: 'newest' | '6.12';
  /** What its user space is: this host's, or one made of Debian's packages. */
  readonly root: 'host' | 'debian';
  readonly qemu: readonly string[];
  readonly kernel: readonly string[];
  /** Runs when no machine is named. */
  readonly always: boolean;
  /** Parts of the names of test files, where not all of them are for its kernel. */
  readonly files?: readonly string[];
}

const x86 = {
  arch: 'x86_64',
  root: 'host',
  qemu: ['-M', 'q35', '-cpu', 'max', '-m', '4096'],
  kernel: ['console=ttyS0', 'kvm_amd.npt=1'],
} as const;

const arm64Board = ['-M', 'virt,virtualization=on,gic-version=3', '-m', '3072'] as const;

const arm64 = {
  arch: 'aarch64',
  series: 'newest',
  root: 'debian',
  // Pointer authentication as the architecture has it takes a third of the time under TCG.
  qemu: [...arm64Board, '-cpu', 'max,pauth-impdef=on'],
  kernel: ['console=ttyAMA0'],
} as const;

export const machines: readonly Machine[] = [
  { ...x86, name: 'x86', series: 'newest', always: true, what: 'x86-64, SW_PROTECTED VMs on SVM with nested paging' },
  { ...arm64, name: 'arm64', always: true, what: 'arm64' },
  {
    ...arm64,
    name: 'pkvm',
    // Protected KVM gives each VM all address bits of the CPU and walks them at its end: 0.3 s with 48, 1 ms with this one's 40.
    qemu: [...arm64Board, '-cpu', 'cortex-a53'],
    kernel: [...arm64.kernel, 'kvm-arm.mode=protected'],
    always: true,
    what: 'arm64 with protected KVM',
  },
  {
    ...x86,
    name: 'x86-6.12',
    series: '6.12',
    always: false,
    what: 'x86-64 before guest_memfd could be mapped',
    // The others have files in ordinary VMs, or map them.
    files: [
      'conformance',
      'differential',
      'linux_vcpu',
      '/vcpu.test',
      'memslot_lock',
      'memory_user',
      'agent',
      'pager',
      'unicorn',
    ],
  },
];
