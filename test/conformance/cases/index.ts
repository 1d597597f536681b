import type { Section } from '../scenario.ts';
import { boundary } from './boundary.ts';
import { dirtyLog, guestDirtyLog } from './dirty_log.ts';
import { fallocate } from './fallocate.ts';
import { fileOperations } from './file.ts';
import { guestAccess, privateAccess, protectedAccess, runs } from './guest_access.ts';
import { createGuestMemfd } from './guest_memfd.ts';
import { hypercalls } from './hypercall.ts';
import { lifetimes, protectedSlots } from './lifetime.ts';
import { memoryAttributes } from './memory_attributes.ts';
import { gmemSlotCases, slotArguments, slotChanges } from './memslot.ts';
import { hostAccess, mmap } from './mmap.ts';
import { ordinaryMemory } from './ordinary_memory.ts';
import { preFault } from './pre_fault.ts';
import { checkExtension, createVm, dispatch, enableCap } from './vm.ts';

/** The contract, case by case. */
export const sections: readonly Section[] = [
  dispatch,
  createVm,
  checkExtension,
  enableCap,
  createGuestMemfd,
  fileOperations,
  fallocate,
  mmap,
  hostAccess,
  slotArguments,
  slotChanges,
  gmemSlotCases,
  protectedSlots,
  lifetimes,
  memoryAttributes,
  guestAccess,
  privateAccess,
  protectedAccess,
  runs,
  preFault,
  hypercalls,
  dirtyLog,
  guestDirtyLog,
  ordinaryMemory,
  boundary,
];
