import { KVM_MEM_GUEST_MEMFD, MADV_HWPOISON, MADV_SOFT_OFFLINE } from '../../uapi.ts';
import { isZero, sumExceeds } from '../arguments.ts';
import type { RegionRequest, VmFile } from '../state.ts';

/** Accepted by mistake, and harmful, on some kernels (contract §19, §19.1): never sent to any. */
export function isDangerous(vm: VmFile, request: RegionRequest): boolean {
  const slot = vm.slot(request.addressSpace, request.id);
  const bound = (request.flags & KVM_MEM_GUEST_MEMFD) !== 0;
  if (isZero(request.memorySize)) return false;
  if (slot) return bound || (slot.flags & KVM_MEM_GUEST_MEMFD) !== 0;
  return bound && sumExceeds(request.guestMemfdOffset, request.memorySize, (1n << 63n) - 1n);
}

/** Would poison memory of the machine. */
export function isHarmful(advice: number): boolean {
  return advice === MADV_HWPOISON || advice === MADV_SOFT_OFFLINE;
}
