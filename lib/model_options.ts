export type Arch = 'x86_64' | 'aarch64';

/** The kernel versions the software kernel can play: each changed something that can be seen at the boundary. */
export const kernelVersions = ['6.8', '6.11', '6.18', '6.19', '7.1', '7.2', '7.3'] as const;
export type KernelVersion = (typeof kernelVersions)[number];

/** Kernel interfaces that have been proposed and that no released kernel has. */
export const proposals = [
  'in-place-conversion',
  'guest-seal',
  'special-mapping',
  'grant-ring',
  'write-population',
  'large-folios',
  'memslot-lock',
  'link',
] as const;
export type Proposal = (typeof proposals)[number];

/** Which kernel, on which machine, the software backend plays. */
export interface ModelOptions {
  /** x86_64 by default, whatever the host is. */
  readonly arch?: Arch;
  /** The newest by default. */
  readonly kernel?: KernelVersion;
  /** Bytes: 4096 (default), and on aarch64 also 16384 and 65536. */
  readonly pageSize?: number;
  /** x86_64: whether SW_PROTECTED VMs can be created, and so whether the attributes ioctl exists. Default true; needs `tdp`. */
  readonly swProtected?: boolean;
  /** x86_64: hardware paging for guests (NPT, EPT). Default true; false plays a host without it. */
  readonly tdp?: boolean;
  /** x86_64: system management mode, and with it a second address space in ordinary VMs. Default true. */
  readonly smm?: boolean;
  /** aarch64: a host booted with kvm-arm.mode=protected, which can create protected VMs since 7.1. Default false. */
  readonly pkvm?: boolean;
  /** Bits of guest physical address. x86_64: the host's, default 46 with `tdp` and 52 without. aarch64: the widest a VM may ask for, default 52. */
  readonly physicalAddressBits?: number;
  /** Bits of a process's address. x86_64: 47 (default), or 56 with 5-level paging. aarch64: 48 (default) or 52. */
  readonly userAddressBits?: number;
  /** Bytes that the process may lock, as RLIMIT_MEMLOCK has it for an ordinary user; as many as it likes when omitted, as for root. */
  readonly lockLimit?: number;
  /**
   * Proposed interfaces that the newest kernel shall have besides its own; none by default. Their numbers may change, and mean something else
   * on kernels that exist.
   */
  readonly proposals?: readonly Proposal[];
}
