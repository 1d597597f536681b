import type { Kernel } from '../../lib/kernel/kernel.ts';
import {
  FALLOC_FL_KEEP_SIZE,
  FALLOC_FL_PUNCH_HOLE,
  KVM_CAP,
  KVM_CREATE_GUEST_MEMFD,
  MAP_SHARED,
  PROT_READ,
  PROT_WRITE,
} from '../../lib/uapi.ts';

const KVM_GET_MP_STATE = 0x8004ae98;

/**
 * What another process does with the fds it inherits. Each runs either over the software kernel's `fork()` or in a child process of
 * the running kernel, which finds it here by name.
 */
export type ChildProgram = (kernel: Kernel, fds: readonly number[]) => number[];

function mapShared(kernel: Kernel, fd: number): number {
  return kernel.mmap({ length: kernel.pageSize, prot: PROT_READ | PROT_WRITE, flags: MAP_SHARED, fd, offset: 0 });
}

/** Every kind of VM ioctl on the parent's VM: valid, with a NULL pointer, unknown. */
export function useVm(kernel: Kernel, [vm = -1]: readonly number[]): number[] {
  return [
    kernel.checkExtension(vm, KVM_CAP.USER_MEMORY),
    kernel.ioctl(vm, KVM_CREATE_GUEST_MEMFD, 0),
    kernel.ioctl(vm, 0xaeff, 0),
    kernel.setUserMemoryRegion(vm, { slot: 0, flags: 0, guestPhysAddr: 0, memorySize: 0, userspaceAddr: 0 }),
  ];
}

export function createGmemOnVm(kernel: Kernel, [vm = -1]: readonly number[]): number[] {
  return [kernel.createGuestMemfd(vm, { size: kernel.pageSize, flags: 0 })];
}

export function useKvm(kernel: Kernel, [kvm = -1]: readonly number[]): number[] {
  return [kernel.checkExtension(kvm, KVM_CAP.USER_MEMORY), kernel.getApiVersion(kvm), kernel.createVm(kvm, 0)];
}

/** Requests on the parent's vCPU: one that copies a struct, one that would be refused for its flags. */
export function useVcpu(kernel: Kernel, [vcpu = -1]: readonly number[]): number[] {
  return [
    kernel.ioctlStruct(vcpu, KVM_GET_MP_STATE, new Uint8Array(4)),
    kernel.preFaultMemory(vcpu, { gpa: 0n, size: 0n, flags: 1 }),
  ];
}

export function punchFirstPage(kernel: Kernel, [file = -1]: readonly number[]): number[] {
  return [kernel.fallocate(file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kernel.pageSize)];
}

export function allocateFirstPage(kernel: Kernel, [file = -1]: readonly number[]): number[] {
  return [kernel.fallocate(file, FALLOC_FL_KEEP_SIZE, 0, kernel.pageSize)];
}

/** Reads the first byte and writes 2 in its place. */
export function readAndWriteMapping(kernel: Kernel, [file = -1]: readonly number[]): number[] {
  const mapping = mapShared(kernel, file);
  const byte = new Uint8Array(1);
  return [kernel.peek(mapping, 0, byte), byte[0] as number, kernel.poke(mapping, 0, Uint8Array.of(2))];
}

export function closeFile(kernel: Kernel, [file = -1]: readonly number[]): number[] {
  return [kernel.close(file)];
}

/** Duplicates an fd until none is left. */
function exhaust(kernel: Kernel, fd: number): void {
  while (kernel.dup(fd) >= 0);
}

export function createVmWithoutFds(kernel: Kernel): number[] {
  const kvm = kernel.openKvm();
  exhaust(kernel, kvm);
  return [kernel.createVm(kvm, 0x1ff), kernel.createVm(kvm, 0)];
}

export function createGmemWithoutFds(kernel: Kernel): number[] {
  const kvm = kernel.openKvm();
  const vm = kernel.createVm(kvm, 0);
  exhaust(kernel, kvm);
  return [
    kernel.createGuestMemfd(vm, { size: 0, flags: 0 }),
    kernel.createGuestMemfd(vm, { size: kernel.pageSize, flags: 1n << 63n }),
    kernel.createGuestMemfd(vm, { size: kernel.pageSize, flags: 0 }),
  ];
}

/** Touches a page of a file that was created without INIT_SHARED, past every guard. */
export function touchUnshared(kernel: Kernel, [file = -1]: readonly number[]): number[] {
  return [kernel.window(mapShared(kernel, file), 0, 1)[0] as number];
}

export const childPrograms: readonly ChildProgram[] = [
  useVm,
  createGmemOnVm,
  useKvm,
  useVcpu,
  punchFirstPage,
  allocateFirstPage,
  readAndWriteMapping,
  closeFile,
  createVmWithoutFds,
  createGmemWithoutFds,
  touchUnshared,
];
