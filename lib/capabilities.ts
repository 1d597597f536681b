import type { Kernel } from './kernel/kernel.ts';
import {
  GUEST_MEMFD_FLAG_INIT_SHARED,
  GUEST_MEMFD_FLAG_MMAP,
  KVM_CAP,
  KVM_MEMORY_ATTRIBUTE_PRIVATE,
  MAP_SHARED,
  MPOL_LOCAL,
  PROT_READ,
  PROT_WRITE,
} from './uapi.ts';
import {
  KVM_CAP_PROPOSED,
  KVM_UNLOCK_MEM_ALL,
  KVM_UNLOCK_MEMORY_REGION,
  SET_MEMORY_ATTRIBUTES2_PRESERVE,
  SET_MEMORY_ATTRIBUTES2_ZERO,
} from './uapi_proposed.ts';

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
  /** What conversion in place can be told about content, as flags: 1 zero, 2 preserve. */
  readonly conversionContent: bigint;
  /** KVM_PRE_FAULT_MEMORY, Linux 6.11. */
  readonly preFaultMemory: boolean;
  /** The guest's MAP_GPA_RANGE hypercall can exit. x86_64, Linux 5.14. */
  readonly mapGpaRangeExit: boolean;
  /** An access that finds no page exits with the range. Linux 6.8; arm64 reports nothing but does so wherever it has guest_memfd. */
  readonly memoryFaultExit: boolean;
  /** KVM itself can lock memslots, as proposed (KVM_CAP_ARM_LOCK_USER_MEMORY_REGION); elsewhere lock() is carried out by this process. */
  readonly memslotLock: boolean;
  /** Slots of one address space. */
  readonly memslots: number;
  readonly addressSpaces: number;
  /** For each of the above, how it is known: asked of the kernel, tried out, or played by the software kernel. */
  readonly evidence: Readonly<Record<string, 'probed' | 'reported' | 'modelled'>>;
}

/**
 * What KVM_SET_MEMORY_ATTRIBUTES2 does here, found by converting a page of a file of its own: numbers of capabilities that are proposed mean
 * other things on other kernels. null: there was nothing to try it on.
 */
function probeConversion(kernel: Kernel, vm: number, flags: number): { works: boolean; content: number } | null {
  if (!(flags & GUEST_MEMFD_FLAG_MMAP)) return null;
  const { pageSize: size } = kernel;
  const scratch = kernel.createGuestMemfd(vm, {
    size,
    flags: flags & (GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED),
  });
  if (scratch < 0) return null;
  const attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;
  const convert = (mode: number) =>
    kernel.setMemoryAttributes2(scratch, { offset: 0, size, attributes, flags: mode }) === 0;
  const works = convert(0);
  const modes = works ? [SET_MEMORY_ATTRIBUTES2_ZERO, SET_MEMORY_ATTRIBUTES2_PRESERVE].filter(convert) : [];
  kernel.close(scratch);
  return { works, content: modes.reduce((all, mode) => all | mode, 0) };
}

/** Whether unlocking everything, when nothing is locked, is something the VM can do: a kernel without locks, whatever it has under the number, cannot. */
function probeMemslotLock(kernel: Kernel, vm: number): boolean {
  const cap = KVM_CAP_PROPOSED.ARM_LOCK_USER_MEMORY_REGION;
  return kernel.enableCap(vm, { cap, flags: KVM_UNLOCK_MEMORY_REGION, args: [0, KVM_UNLOCK_MEM_ALL, 0, 0] }) === 0;
}

/** Whether a NUMA policy that was set through one mapping of a guest_memfd is there in another: then it is the file's, and not the mapping's. */
export function guestMemfdKeepsPolicy(kernel: Kernel, vm: number): boolean {
  const { pageSize: length } = kernel;
  const file = kernel.createGuestMemfd(vm, { size: length, flags: GUEST_MEMFD_FLAG_MMAP });
  if (file < 0) return false;
  const map = () => kernel.mmap({ length, prot: PROT_READ | PROT_WRITE, flags: MAP_SHARED, fd: file, offset: 0 });
  const mappings = [map(), map()];
  const [one = -1, other = -1] = mappings;
  const set = kernel.mbind(one, 0, length, MPOL_LOCAL, []);
  const keeps = set === 0 && kernel.getMempolicy(other, 0) === MPOL_LOCAL;
  for (const mapping of mappings) if (mapping >= 0) kernel.munmap(mapping);
  kernel.close(file);
  return keeps;
}

export function vmCapabilities(kernel: Kernel, vm: number): VmCapabilities {
  const ask = (capability: number): number => Math.max(0, kernel.checkExtension(vm, capability));
  const guestMemfd = ask(KVM_CAP.GUEST_MEMFD) > 0;
  const flags = ask(KVM_CAP.GUEST_MEMFD_FLAGS);
  const attributes = ask(KVM_CAP.MEMORY_ATTRIBUTES);
  const inPlace = guestMemfd ? probeConversion(kernel, vm, flags) : null;
  const byAttributes = guestMemfd && (attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE) !== 0;
  const conversion = inPlace?.works ? 'in-place' : byAttributes ? 'attributes' : 'none';
  const answers = {
    guestMemfd,
    guestMemfdMmap: (flags & GUEST_MEMFD_FLAG_MMAP) !== 0,
    guestMemfdInitShared: (flags & GUEST_MEMFD_FLAG_INIT_SHARED) !== 0,
    memoryAttributes: BigInt(attributes),
    conversion: conversion as VmCapabilities['conversion'],
    conversionContent: BigInt(inPlace?.content ?? 0),
    preFaultMemory: ask(KVM_CAP.PRE_FAULT_MEMORY) > 0,
    mapGpaRangeExit: (ask(KVM_CAP.EXIT_HYPERCALL) & 0x1000) !== 0,
    memoryFaultExit: ask(KVM_CAP.MEMORY_FAULT_INFO) > 0 || (kernel.arch === 'aarch64' && guestMemfd),
    memslotLock: probeMemslotLock(kernel, vm),
    memslots: ask(KVM_CAP.NR_MEMSLOTS),
    addressSpaces: Math.max(1, ask(KVM_CAP.MULTI_ADDRESS_SPACE)),
  };
  const how = kernel.name === 'software' ? ('modelled' as const) : ('reported' as const);
  const probed = {
    ...((answers.memslotLock || how === 'reported') && { memslotLock: 'probed' as const }),
    ...(inPlace && { conversion: 'probed' as const, conversionContent: 'probed' as const }),
  };
  return {
    ...answers,
    evidence: { ...Object.fromEntries(Object.keys(answers).map((name) => [name, how])), ...probed },
  };
}
