import type { Kernel } from '../../lib/kernel/kernel.ts';
import { Machine } from '../../lib/kernel/machine.ts';
import { type KernelVersion, kernelVersions, type ModelOptions } from '../../lib/model_options.ts';
import { KVM_CAP, KVM_VM_TYPE_ARM_PROTECTED } from '../../lib/uapi.ts';
import { compareVersions } from '../conformance/scenario.ts';
import type { Facts } from './program.ts';

/** The model that plays this kernel: the newest version that is not newer, with what the kernel says it has and what it accepts. */
export function modelOf(kernel: Kernel): ModelOptions {
  const kvm = kernel.openKvm();
  const ask = (capability: number): number => kernel.checkExtension(kvm, capability);
  const arm = kernel.arch === 'aarch64';
  const vm = kernel.createVm(kvm, 0);
  try {
    const version = kernelVersions.filter((version) => compareVersions(kernel.release, version) >= 0).at(-1) ?? '6.8';
    const common = { arch: kernel.arch, kernel: version as KernelVersion, pageSize: kernel.pageSize };
    if (arm) {
      const pkvm = accepts(kernel, kernel.createVm(kvm, KVM_VM_TYPE_ARM_PROTECTED));
      const bits = {
        physicalAddressBits: ask(KVM_CAP.ARM_VM_IPA_SIZE),
        userAddressBits: userBits(kernel, vm, [48, 52]),
      };
      return { ...common, ...bits, pkvm };
    }
    return {
      ...common,
      swProtected: (ask(KVM_CAP.VM_TYPES) & 2) !== 0,
      tdp: ask(KVM_CAP.PRE_FAULT_MEMORY) > 0,
      smm: ask(KVM_CAP.MULTI_ADDRESS_SPACE) > 1,
      physicalAddressBits: guestBits(kernel, vm),
      userAddressBits: userBits(kernel, vm, [47, 56]),
    };
  } finally {
    kernel.close(vm);
    kernel.close(kvm);
  }
}

/** The same numbers as the model has them. */
export function factsOf(model: ModelOptions): Facts {
  const machine = Machine.model(model);
  const bits = machine.isArm ? 40 : machine.physicalAddressBits;
  return { page: machine.pageSize, limit: 1n << BigInt(bits), task: machine.taskSize };
}

function accepts(kernel: Kernel, fd: number): boolean {
  if (fd >= 0) kernel.close(fd);
  return fd >= 0;
}

/** One page of a slot, tried at the end of 2^bits bytes of guest physical address. */
function guestBits(kernel: Kernel, vm: number): number {
  for (let bits = 52; bits > 32; bits--) {
    if (tryRegion(kernel, vm, (1n << BigInt(bits)) - BigInt(kernel.pageSize), 0n)) return bits;
  }
  return 32;
}

function userBits(kernel: Kernel, vm: number, candidates: readonly [number, number]): number {
  const [smaller, larger] = candidates;
  return tryRegion(kernel, vm, 0n, 1n << BigInt(smaller + 1)) ? larger : smaller;
}

function tryRegion(kernel: Kernel, vm: number, guestPhysAddr: bigint, userspaceAddr: bigint): boolean {
  const region = { slot: 0, flags: 0, guestPhysAddr, memorySize: kernel.pageSize, userspaceAddr };
  if (kernel.setUserMemoryRegion(vm, region) !== 0) return false;
  kernel.setUserMemoryRegion(vm, { ...region, memorySize: 0 });
  return true;
}
