import { type Arch, type KernelVersion, kernelVersions, type ModelOptions, type Proposal } from '../model_options.ts';
import { GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP, KVM_MEMORY_ATTRIBUTE_PRIVATE } from '../uapi.ts';
import {
  GUEST_MEMFD_FLAG_HUGETLB,
  GUEST_MEMFD_FLAG_WRITE,
  KVM_CAP_PROPOSED,
  SET_MEMORY_ATTRIBUTES2_FLAGS,
} from '../uapi_proposed.ts';
import { boolean, integer, rangeError, shown } from '../validate.ts';
import { modelledProposals } from './proposals.ts';

/** The kernel and the hardware a rule is about: which build, which version, which limits. Contract §3, §4, §19. */
export class Machine {
  readonly arch: Arch;
  readonly release: string;
  readonly pageSize: number;
  /** SW_PROTECTED VMs and the attributes ioctl are there. */
  readonly swProtected: boolean;
  readonly tdp: boolean;
  readonly pkvm: boolean;
  /** x86: system management mode is built in, so that ordinary VMs have a second address space. */
  readonly smm: boolean;
  /** Interfaces it has before their time; a real kernel is never said to have any. */
  readonly proposals: ReadonlySet<Proposal>;
  /** Bytes; Infinity for none. */
  readonly lockLimit: number;
  readonly #version: number;
  readonly #physicalAddressBits: number | undefined;
  readonly #userAddressBits: number | undefined;

  constructor(options: {
    arch: Arch;
    release: string;
    pageSize: number;
    swProtected: boolean;
    tdp: boolean;
    pkvm: boolean;
    smm: boolean;
    physicalAddressBits?: number | undefined;
    userAddressBits?: number | undefined;
    proposals?: ReadonlySet<Proposal>;
    lockLimit?: number | undefined;
  }) {
    this.arch = options.arch;
    this.release = options.release;
    this.pageSize = options.pageSize;
    this.swProtected = options.swProtected;
    this.tdp = options.tdp;
    this.pkvm = options.pkvm;
    this.smm = options.smm;
    this.#physicalAddressBits = options.physicalAddressBits;
    this.#userAddressBits = options.userAddressBits;
    this.proposals = options.proposals ?? new Set();
    this.lockLimit = options.lockLimit ?? Number.POSITIVE_INFINITY;
    this.#version = versionNumber(options.release);
  }

  static model(options: ModelOptions = {}): Machine {
    const {
      arch = 'x86_64',
      kernel = '7.3',
      pageSize = 4096,
      pkvm = false,
      smm = arch === 'x86_64',
      tdp = true,
      swProtected = tdp && arch === 'x86_64',
      physicalAddressBits,
      userAddressBits,
      lockLimit,
    } = options;
    const pageSizes = arch === 'x86_64' ? [4096] : [4096, 16384, 65536];
    const refuse = (what: string): never => {
      throw rangeError(`software kernel: ${what}`);
    };
    for (const [name, value] of Object.entries({ swProtected, tdp, pkvm, smm })) boolean(name, value);
    if (arch !== 'x86_64' && arch !== 'aarch64') refuse(`arch is 'x86_64' or 'aarch64', not ${shown(arch)}`);
    if (!kernelVersions.includes(kernel)) refuse(`kernel is one of ${kernelVersions.join(', ')}, not ${shown(kernel)}`);
    if (!pageSizes.includes(pageSize))
      refuse(`pageSize on ${arch} is one of ${pageSizes.join(', ')}, not ${shown(pageSize)}`);
    if (swProtected && arch !== 'x86_64') refuse('SW_PROTECTED VMs exist on x86_64 only');
    if (swProtected && !tdp) refuse('SW_PROTECTED VMs need hardware paging (tdp)');
    if (smm && arch !== 'x86_64') refuse('system management mode exists on x86_64 only');
    if (pkvm && arch !== 'aarch64') refuse('pKVM exists on aarch64 only');
    for (const [name, bits] of Object.entries({ physicalAddressBits, userAddressBits })) {
      const fits = bits === undefined || (Number.isInteger(bits) && bits >= 32 && bits <= 57);
      if (!fits) refuse(`${name} is between 32 and 57, not ${shown(bits)}`);
    }
    if (lockLimit !== undefined) integer('model.lockLimit', lockLimit);
    const proposed = modelledProposals(options.proposals ?? []);
    if (proposed.size > 0 && kernel !== kernelVersions.at(-1))
      refuse(`proposals are made for the newest kernel, ${kernelVersions.at(-1)}, not for ${kernel}`);
    return new Machine({
      arch,
      release: kernel,
      pageSize,
      swProtected,
      tdp,
      pkvm,
      smm,
      physicalAddressBits,
      userAddressBits,
      lockLimit,
      proposals: proposed,
    });
  }

  since(version: KernelVersion): boolean {
    return this.#version >= versions[version];
  }

  get isArm(): boolean {
    return this.arch === 'aarch64';
  }

  /** CONFIG_KVM_GUEST_MEMFD: before 6.18 it came with private memory only. */
  get hasGuestMemfd(): boolean {
    return this.since('6.18') || this.swProtected;
  }

  /** KVM_USER_MEM_SLOTS */
  get userSlots(): number {
    return this.isArm ? 32767 : 32764;
  }

  /** x86: one bit per VM type that can be created. */
  get vmTypes(): number {
    return this.swProtected ? 0b11 : 0b1;
  }

  /** arm64: the widest intermediate physical address a VM may ask for, in bits. */
  get ipaLimit(): number {
    return this.#physicalAddressBits ?? 52;
  }

  /** x86: bits of guest physical address a memslot may use: the host's MAXPHYADDR with TDP, the architecture's 52 without. */
  get physicalAddressBits(): number {
    return this.#physicalAddressBits ?? (this.tdp ? 46 : 52);
  }

  /** Where Linux puts mappings nobody asked an address for: below what 4-level paging reaches, and the stack. */
  get mmapEnd(): bigint {
    const window = 1n << BigInt(Math.min(this.#userAddressBits ?? 64, this.isArm ? 48 : 47));
    return window - (1n << 27n);
  }

  /** End of the user half of the address space. */
  get taskSize(): bigint {
    const end = 1n << BigInt(this.#userAddressBits ?? (this.isArm ? 48 : 47));
    return this.isArm ? end : end - 4096n;
  }
}

function versionNumber(release: string): number {
  const [major = 0, minor = 0] = release.split('.', 2).map((part) => Number.parseInt(part, 10));
  return major * 1000 + minor;
}

const versions = Object.fromEntries(kernelVersions.map((version) => [version, versionNumber(version)])) as Record<
  KernelVersion,
  number
>;

/** What a capability depends on besides the machine: undefined for /dev/kvm. */
export interface VmKind {
  readonly hasPrivate: boolean;
  readonly addressSpaces: number;
  readonly isProtected: boolean;
}

/** The longest ring of grants, proposed. */
export const GRANT_RING_ENTRIES = 256;

/** KVM_CHECK_EXTENSION. Contract §4. */
export function checkExtension(machine: Machine, capability: number, vm?: VmKind): number {
  const { isArm } = machine;
  const x86 = (value: number): number => (isArm ? 0 : value);
  switch (capability) {
    case KVM_CAP.USER_MEMORY:
    case KVM_CAP.SYNC_MMU:
    case KVM_CAP.CHECK_EXTENSION_VM:
    case KVM_CAP.USER_MEMORY2:
      return 1;
    case KVM_CAP.NR_MEMSLOTS:
      return machine.userSlots;
    case KVM_CAP.READONLY_MEM:
      return vm?.isProtected ? 0 : 1;
    case KVM_CAP.MULTI_ADDRESS_SPACE:
      return x86(vm?.addressSpaces ?? (machine.smm ? 2 : 0));
    case KVM_CAP.ARM_VM_IPA_SIZE:
      return isArm ? machine.ipaLimit : 0;
    case KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2:
      return 3;
    case KVM_CAP.DIRTY_LOG_RING:
      return x86(1 << 20);
    case KVM_CAP.DIRTY_LOG_RING_ACQ_REL:
      return 1 << 20;
    case KVM_CAP.DIRTY_LOG_RING_WITH_BITMAP:
      return isArm ? 1 : 0;
    case KVM_CAP.EXIT_HYPERCALL:
      return x86(0x1000);
    case KVM_CAP.MEMORY_FAULT_INFO:
      return x86(1);
    case KVM_CAP.MEMORY_ATTRIBUTES:
      return supportedAttributes(machine, vm);
    case KVM_CAP.GUEST_MEMFD:
      return machine.since('6.18') || (machine.hasGuestMemfd && (vm?.hasPrivate ?? true)) ? 1 : 0;
    case KVM_CAP.VM_TYPES:
      return x86(machine.vmTypes);
    case KVM_CAP.PRE_FAULT_MEMORY:
      return x86(machine.since('6.11') && machine.tdp ? 1 : 0);
    case KVM_CAP.GUEST_MEMFD_FLAGS:
      return guestMemfdFlags(machine, vm);
    case KVM_CAP_PROPOSED.GUEST_MEMFD_MEMORY_ATTRIBUTES:
      return conversionAttributes(machine, vm);
    case KVM_CAP_PROPOSED.MEMORY_ATTRIBUTES2_FLAGS:
      return conversionAttributes(machine, vm) && SET_MEMORY_ATTRIBUTES2_FLAGS;
    case KVM_CAP_PROPOSED.GRANT_RING:
      return machine.proposals.has('grant-ring') && conversionAttributes(machine, vm) ? GRANT_RING_ENTRIES : 0;
    case KVM_CAP_PROPOSED.ARM_LOCK_USER_MEMORY_REGION:
      return machine.proposals.has('memslot-lock') ? 1 : 0;
    default:
      return 0;
  }
}

export function supportedAttributes(machine: Machine, vm?: VmKind): number {
  return machine.swProtected && (vm?.hasPrivate ?? true) ? 8 : 0;
}

/** The attributes that KVM_SET_MEMORY_ATTRIBUTES2 takes on a guest_memfd: private, where VMs have private memory. */
export function conversionAttributes(machine: Machine, vm?: VmKind): number {
  if (!machine.proposals.has('in-place-conversion')) return 0;
  const isPrivate = vm ? vm.hasPrivate || vm.isProtected : machine.swProtected || machine.pkvm;
  return isPrivate ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0;
}

export function guestMemfdFlags(machine: Machine, vm?: VmKind): number {
  if (!machine.since('6.18')) return 0;
  const initShared = !vm?.hasPrivate || machine.proposals.has('in-place-conversion');
  const proposed =
    (machine.proposals.has('large-folios') ? GUEST_MEMFD_FLAG_HUGETLB : 0) |
    (machine.proposals.has('write-population') ? GUEST_MEMFD_FLAG_WRITE : 0);
  return GUEST_MEMFD_FLAG_MMAP | (initShared ? GUEST_MEMFD_FLAG_INIT_SHARED : 0) | proposed;
}
