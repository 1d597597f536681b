import type { LinuxKernel } from '../lib/kernel/linux/linux_kernel.ts';
import { KiB, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE } from '../lib/uapi.ts';

export const KVM_GET_REGS = 0x8090ae81;
export const KVM_SET_REGS = 0x4090ae82;
const KVM_GET_SREGS = 0x8138ae83;
const KVM_SET_SREGS = 0x4138ae84;

/** out 0x80, al; jmp to it */
export const portLoop = [0xe6, 0x80, 0xeb, 0xfc];
/** jmp to itself */
export const endless = [0xeb, 0xfe];

const ENTRY = 0x1000;
const SIZE = 64 * KiB;

export interface TestGuest {
  readonly kvm: number;
  readonly vm: number;
  readonly vcpu: number;
  /** What is still open of it. */
  close(): void;
}

/** A real-mode guest with 64 KiB of memory, about to execute `code` (x86). */
export function createGuest(kernel: LinuxKernel, code: readonly number[]): TestGuest {
  const done = (result: number, what: string): number => {
    if (result < 0) throw new Error(`${what}: ${result}`);
    return result;
  };
  const kvm = done(kernel.openKvm(), 'open');
  const vm = done(kernel.createVm(kvm, 0), 'KVM_CREATE_VM');
  const memory = done(
    kernel.mmap({ length: SIZE, prot: PROT_READ | PROT_WRITE, flags: MAP_PRIVATE | MAP_ANONYMOUS, fd: -1, offset: 0 }),
    'mmap',
  );
  done(kernel.poke(memory, ENTRY, Uint8Array.from(code)), 'poke');
  const userspaceAddr = kernel.addressOf(memory);
  const region = { slot: 0, flags: 0, guestPhysAddr: 0, memorySize: SIZE, userspaceAddr };
  done(kernel.setUserMemoryRegion(vm, region), 'KVM_SET_USER_MEMORY_REGION');
  const vcpu = done(kernel.createVcpu(vm, 0), 'KVM_CREATE_VCPU');
  const sregs = new Uint8Array(0x138);
  done(kernel.ioctlStruct(vcpu, KVM_GET_SREGS, sregs), 'KVM_GET_SREGS');
  // cs: base and selector 0
  sregs.fill(0, 0, 8);
  sregs.fill(0, 12, 14);
  done(kernel.ioctlStruct(vcpu, KVM_SET_SREGS, sregs), 'KVM_SET_SREGS');
  const regs = new BigUint64Array(0x90 / 8);
  regs[16] = BigInt(ENTRY);
  regs[17] = 2n;
  done(kernel.ioctlStruct(vcpu, KVM_SET_REGS, new Uint8Array(regs.buffer)), 'KVM_SET_REGS');
  const close = (): void => {
    for (const fd of [vcpu, vm, kvm]) kernel.close(fd);
    kernel.munmap(memory);
  };
  return { kvm, vm, vcpu, close };
}
