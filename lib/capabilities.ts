import type { Kernel } from './kernel/kernel.ts';
import { GUEST_MEMFD_FLAG_INIT_SHARED, GUEST_MEMFD_FLAG_MMAP, KVM_CAP, KVM_MEMORY_ATTRIBUTE_PRIVATE } from './uapi.ts';

/** What a VM can do, asked of the VM fd and never inferred from a version. */
export interface VmCapabilities {
  /** Memslots may bind a guest_memfd. Linux 6.8; VMs without private memory, and arm64, since 6.18. */
  readonly guestMemfd: boolean;
  /** A guest_memfd can be created with `mmap`. Linux 6.18. */
  readonly guestMemfdMmap: boolean;
  /** A guest_memfd can be created with `initShared`. Linux 6.18. */
  readonly guestMemfdInitShared: boolean;
  /** The attributes KVM_SET_MEMORY_ATTRIBUTES takes, as bits: 8 is private. */
  readonly memoryAttributes: bigint;
  /** How convert() works here: with the VM's attribute over a pair of memories, in place on the file, or not at all. */
  readonly conversion: 'none' | 'attributes' | 'in-place';
  /** KVM_PRE_FAULT_MEMORY, Linux 6.11. */
  readonly preFaultMemory: boolean;
  /** The guest's MAP_GPA_RANGE hypercall can exit. x86_64, Linux 5.14. */
  readonly mapGpaRangeExit: boolean;
  /** An access that finds no page exits with the range. Linux 6.8; arm64 reports nothing but does so wherever it has guest_memfd. */
  readonly memoryFaultExit: boolean;
  /** Slots of one address space. */
  readonly memslots: number;
  readonly addressSpaces: number;
  /** For each of the above, how it is known: asked of the kernel, tried out, or played by the software kernel. */
  readonly evidence: Readonly<Record<string, 'probed' | 'reported' | 'modelled'>>;
}

export function vmCapabilities(kernel: Kernel, vm: number): VmCapabilities {
  const ask = (capability: number): number => Math.max(0, kernel.checkExtension(vm, capability));
  const guestMemfd = ask(KVM_CAP.GUEST_MEMFD) > 0;
  const flags = ask(KVM_CAP.GUEST_MEMFD_FLAGS);
  const attributes = ask(KVM_CAP.MEMORY_ATTRIBUTES);
  const answers = {
    guestMemfd,
    guestMemfdMmap: (flags & GUEST_MEMFD_FLAG_MMAP) !== 0,
    guestMemfdInitShared: (flags & GUEST_MEMFD_FLAG_INIT_SHARED) !== 0,
    memoryAttributes: BigInt(attributes),
    conversion: guestMemfd && attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE ? ('attributes' as const) : ('none' as const),
    preFaultMemory: ask(KVM_CAP.PRE_FAULT_MEMORY) > 0,
    mapGpaRangeExit: (ask(KVM_CAP.EXIT_HYPERCALL) & 0x1000) !== 0,
    memoryFaultExit: ask(KVM_CAP.MEMORY_FAULT_INFO) > 0 || (kernel.arch === 'aarch64' && guestMemfd),
    memslots: ask(KVM_CAP.NR_MEMSLOTS),
    addressSpaces: Math.max(1, ask(KVM_CAP.MULTI_ADDRESS_SPACE)),
  };
  const how = kernel.name === 'software' ? ('modelled' as const) : ('reported' as const);
  return { ...answers, evidence: Object.fromEntries(Object.keys(answers).map((name) => [name, how])) };
}
