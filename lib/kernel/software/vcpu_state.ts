import { ERRNO, KVM_GET_REGS, KVM_GET_SREGS, KVM_REGS } from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import type { SoftwareVcpu } from './vcpu.ts';

/** The state ioctls whose struct is kept as it is: by request, the one that reads the same struct. */
const x86Structs = pairs([
  [0x8090ae81, 0x4090ae82], // REGS
  [0x8138ae83, 0x4138ae84], // SREGS
  [0x81a0ae8c, 0x41a0ae8d], // FPU
  [0x8004ae98, 0x4004ae99], // MP_STATE
  [0xc008ae88, 0x4008ae89], // MSRS
  [0xc008ae91, 0x4008ae90], // CPUID2
]);
const armStructs = pairs([[0x8004ae98, 0x4004ae99]]);

const KVM_GET_MSRS = 0xc008ae88;
const KVM_SET_MSRS = 0x4008ae89;
const KVM_SET_CPUID2 = 0x4008ae90;
const KVM_GET_CPUID2 = 0xc008ae91;

function pairs(list: readonly (readonly [number, number])[]): ReadonlyMap<number, { readonly reads: number }> {
  return new Map(list.flatMap(([reads, writes]) => [[reads, { reads }] as const, [writes, { reads }] as const]));
}

export function vcpuStructs(isArm: boolean): ReadonlyMap<number, { readonly reads: number }> {
  return isArm ? armStructs : x86Structs;
}

/** The state of a CPU after reset, as far as it is not zero. Intel SDM volume 3, table 10-1. */
export function resetStructs(vcpu: SoftwareVcpu): void {
  if (vcpu.vm.machine.isArm) return;
  const regs = new DataView(new ArrayBuffer(144));
  regs.setBigUint64(8 * KVM_REGS.indexOf('rdx'), 0x600n, true);
  regs.setBigUint64(8 * KVM_REGS.indexOf('rip'), 0xfff0n, true);
  regs.setBigUint64(8 * KVM_REGS.indexOf('rflags'), 2n, true);
  vcpu.structs.set(KVM_GET_REGS, new Uint8Array(regs.buffer));
  const sregs = new DataView(new ArrayBuffer(312));
  // Eight segments of 24 bytes: base, limit, selector, type, present, dpl, db, s, l, g, avl.
  for (let segment = 0; segment < 8; segment++) {
    const code = segment === 0;
    const system = segment >= 6;
    sregs.setBigUint64(24 * segment, code ? 0xffff0000n : 0n, true);
    sregs.setUint32(24 * segment + 8, 0xffff, true);
    sregs.setUint16(24 * segment + 12, code ? 0xf000 : 0, true);
    sregs.setUint8(24 * segment + 14, segment === 6 ? 2 : segment === 7 ? 11 : code ? 11 : 3);
    sregs.setUint8(24 * segment + 15, 1);
    sregs.setUint8(24 * segment + 18, system ? 0 : 1);
  }
  sregs.setUint16(192 + 8, 0xffff, true);
  sregs.setUint16(208 + 8, 0xffff, true);
  sregs.setBigUint64(224, 0x60000010n, true);
  sregs.setBigUint64(272, vcpu.id === 0 ? 0xfee00900n : 0xfee00800n, true);
  vcpu.structs.set(KVM_GET_SREGS, new Uint8Array(sregs.buffer));
}

/** The structs that end in an array: what their call answers, or null for the others. */
export function variableSize(vcpu: SoftwareVcpu, request: number, struct: Uint8Array): Result | null {
  const view = new DataView(struct.buffer, struct.byteOffset, struct.byteLength);
  if (request === KVM_GET_MSRS || request === KVM_SET_MSRS) return msrs(vcpu, request, view);
  if (request !== KVM_SET_CPUID2 && request !== KVM_GET_CPUID2) return null;
  if (request === KVM_SET_CPUID2) {
    const size = 8 + 40 * view.getUint32(0, true);
    if (struct.length < size) return -ERRNO.EFAULT;
    vcpu.structs.set(KVM_GET_CPUID2, struct.slice(0, size));
    return 0;
  }
  const stored = vcpu.structs.get(KVM_GET_CPUID2) ?? new Uint8Array(8);
  if (view.getUint32(0, true) * 40 + 8 < stored.length) return -ERRNO.E2BIG;
  if (struct.length < stored.length) return -ERRNO.EFAULT;
  struct.set(stored);
  return 0;
}

/** @returns how many entries were handled. */
function msrs(vcpu: SoftwareVcpu, request: number, view: DataView): Result {
  const count = view.getUint32(0, true);
  if (view.byteLength < 8 + 16 * count) return -ERRNO.EFAULT;
  for (let entry = 0; entry < count; entry++) {
    const at = 8 + 16 * entry;
    const index = view.getUint32(at, true);
    if (request === KVM_SET_MSRS) vcpu.msrs.set(index, view.getBigUint64(at + 8, true));
    else view.setBigUint64(at + 8, vcpu.msrs.get(index) ?? 0n, true);
  }
  return count;
}
