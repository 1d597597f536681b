import { systemError } from './errors.ts';
import type { Kernel } from './kernel/kernel.ts';

/** What a vCPU needs before anything can be asked of it: the features of its CPU. */

const KVM_GET_SUPPORTED_CPUID = 0xc008ae05;
const KVM_SET_CPUID2 = 0x4008ae90;
const KVM_ARM_PREFERRED_TARGET = 0x8020aeaf;
const KVM_ARM_VCPU_INIT = 0x4020aeae;
const KVM_ARM_VCPU_PSCI_0_2 = 1 << 2;
const CPUID_ENTRIES = 256;

/** Once for each vCPU. Both are fds. */
export function initialise(kernel: Kernel, vm: number, vcpu: number): void {
  const check = (result: number, request: string): void => {
    if (result < 0) throw systemError(result, { syscall: 'ioctl', request }, kernel.explain());
  };
  if (kernel.arch === 'x86_64') {
    // Without CPUID a guest has neither 64-bit mode nor memory above 64 GiB. The software kernel has no table, and no limit.
    const table = supportedCpuid(kernel);
    if (table) check(kernel.ioctlStruct(vcpu, KVM_SET_CPUID2, table.slice()), 'KVM_SET_CPUID2');
    return;
  }
  const init = new Uint8Array(32);
  check(kernel.ioctlStruct(vm, KVM_ARM_PREFERRED_TARGET, init), 'KVM_ARM_PREFERRED_TARGET');
  const view = new DataView(init.buffer);
  view.setUint32(4, view.getUint32(4, true) | KVM_ARM_VCPU_PSCI_0_2, true);
  check(kernel.ioctlStruct(vcpu, KVM_ARM_VCPU_INIT, init), 'KVM_ARM_VCPU_INIT');
}

const tables = new WeakMap<Kernel, Uint8Array>();

/** What KVM can give a guest: the table of KVM_GET_SUPPORTED_CPUID; undefined where there is none. */
export function supportedCpuid(kernel: Kernel): Uint8Array | undefined {
  const known = tables.get(kernel);
  if (known) return known;
  const kvm = kernel.openKvm();
  if (kvm < 0) return undefined;
  const table = new Uint8Array(8 + 40 * CPUID_ENTRIES);
  new DataView(table.buffer).setUint32(0, CPUID_ENTRIES, true);
  const result = kernel.ioctlStruct(kvm, KVM_GET_SUPPORTED_CPUID, table);
  kernel.close(kvm);
  if (result < 0) return undefined;
  tables.set(kernel, table);
  return table;
}
