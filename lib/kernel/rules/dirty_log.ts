import { isAligned, sumExceeds } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import type { VmFile } from '../state.ts';
import { type Rule, rule } from './rule.ts';

export interface DirtyLogRequest {
  readonly addressSpace: number;
  readonly id: number;
}

export interface ClearRequest extends DirtyLogRequest {
  readonly numPages: number;
  readonly firstPage: U64;
}

const ring: Rule<VmFile, DirtyLogRequest> = rule(
  'ENXIO',
  'dirty-ring',
  (vm) => vm.dirtyRing === 'ring' && 'this VM keeps its dirty log in a ring',
);
const slotId: Rule<VmFile, DirtyLogRequest> = rule('EINVAL', 'slot-id', (vm, { addressSpace, id }) => {
  return (
    (addressSpace >= vm.addressSpaceIds || id >= vm.machine.userSlots) &&
    `there can be no slot ${id} in address space ${addressSpace}`
  );
});
const hasLog: Rule<VmFile, DirtyLogRequest> = rule('ENOENT', 'no-dirty-log', (vm, { addressSpace, id }) => {
  const slot = vm.slot(addressSpace, id);
  return slot ? !slot.dirty && `slot ${id} does not log dirty pages` : `there is no slot ${id}`;
});

/** KVM_GET_DIRTY_LOG. Contract §16. */
export const getDirtyLogRules: readonly Rule<VmFile, DirtyLogRequest>[] = [ring, slotId, hasLog];

/** KVM_CLEAR_DIRTY_LOG. Contract §16. */
export const clearDirtyLogRules: readonly Rule<VmFile, ClearRequest>[] = [
  ring,
  slotId,
  rule(
    'EINVAL',
    'clear-alignment',
    (_vm, { firstPage }) => !isAligned(firstPage, 64) && `first page ${firstPage} is not a multiple of 64`,
  ),
  hasLog,
  rule('EINVAL', 'clear-range', (vm, { addressSpace, id, numPages, firstPage }) => {
    const pages = vm.slot(addressSpace, id)?.pages ?? 0;
    const outside = sumExceeds(firstPage, numPages, pages);
    const ragged = numPages % 64 !== 0 && Number(firstPage) + numPages < pages;
    return (
      (outside || ragged) && `pages ${firstPage}, +${numPages} leave the slot's ${pages} or end inside a group of 64`
    );
  }),
];
