import { KVM_MEM_LOG_DIRTY_PAGES } from '../../uapi.ts';
import { KVM_LOCK_MEM_READ, KVM_LOCK_MEM_WRITE, KVM_UNLOCK_MEM_ALL } from '../../uapi_proposed.ts';
import { hasOtherBits, isZero, low32, sumExceeds, toPages } from '../arguments.ts';
import type { U64 } from '../kernel.ts';
import type { MemslotState, RegionRequest } from '../state.ts';
import { type Rule, rule } from './rule.ts';

/** What a lock needs to know of the slot it names. */
export interface LockableSlot {
  readonly readonly: boolean;
  readonly logsDirtyPages: boolean;
  /** KVM_LOCK_MEM_READ and _WRITE; 0 when it is not locked. */
  readonly locked: number;
}

/** What there is to lock, in a kernel that has the call and for a process that does without alike. */
export interface LockSubject {
  /** Slots a VM may have. */
  readonly slots: number;
  /** null: there is none. */
  readonly slot: LockableSlot | null;
  /** vCPUs that run now. */
  readonly running: number;
}

export interface LockRequest {
  readonly slot: U64;
  /** Rights of a lock; KVM_UNLOCK_MEM_ALL, or 0, of an unlock. */
  readonly flags: U64;
}

const allRights = KVM_LOCK_MEM_READ | KVM_LOCK_MEM_WRITE;
const writes = ({ flags }: LockRequest): boolean => (low32(flags) & KVM_LOCK_MEM_WRITE) !== 0;
const unlocksAll = ({ flags }: LockRequest): boolean => (low32(flags) & KVM_UNLOCK_MEM_ALL) !== 0;

const slotId: Rule<LockSubject, LockRequest> = rule('EINVAL', 'lock-slot-id', ({ slots }, { slot }) => {
  return sumExceeds(slot, 1, slots) && `slot ${slot} is past the last one, ${slots - 1}`;
});

/** KVM_ENABLE_CAP with KVM_CAP_ARM_LOCK_USER_MEMORY_REGION: what comes before the two of them. */
export const lockActionRules: readonly Rule<unknown, { readonly action: number; readonly rest: readonly U64[] }>[] = [
  rule(
    'EINVAL',
    'lock-arguments',
    (_subject, { rest }) => !rest.every(isZero) && 'the last two arguments of a lock are not 0',
  ),
  rule(
    'EINVAL',
    'lock-action',
    (_subject, { action }) => action !== 1 && action !== 2 && `flags are ${action}: 1 locks and 2 unlocks, one of them`,
  ),
];

/** Locking, up to what only the memory itself can say. */
export const lockRules: readonly Rule<LockSubject, LockRequest>[] = [
  slotId,
  rule('EINVAL', 'lock-rights', (_subject, { flags }) => {
    const known = !hasOtherBits(flags, allRights) && (low32(flags) & KVM_LOCK_MEM_READ) !== 0;
    return !known && `rights ${flags} are neither 1, to read, nor 3, to read and write`;
  }),
  rule(
    'EBUSY',
    'lock-running',
    ({ running }) =>
      running > 0 && `${running === 1 ? 'a vCPU runs' : `${running} vCPUs run`}: lock memory while none does`,
  ),
  rule('EINVAL', 'lock-absent', ({ slot }, request) => !slot && `there is no slot ${request.slot} to lock`),
  rule('EPERM', 'lock-write', ({ slot }, request) => {
    if (!writes(request)) return false;
    if (slot?.readonly) return `slot ${request.slot} is read-only: lock it for reading`;
    return slot?.logsDirtyPages && `slot ${request.slot} logs dirty pages, which a writable lock would hide`;
  }),
  rule(
    'EBUSY',
    'lock-twice',
    ({ slot }, request) => slot && slot.locked !== 0 && `slot ${request.slot} is locked already: unlock it first`,
  ),
];

/** What only the call minds: it pins what the slot's host address names, and knows no files of guests. */
export const lockBoundRules: readonly Rule<{ readonly bound: boolean }, LockRequest>[] = [
  rule(
    'EINVAL',
    'lock-bound',
    ({ bound }, { slot }) => bound && `slot ${slot} is bound to a guest_memfd, whose pages stay where they are anyway`,
  ),
];

export const unlockRules: readonly Rule<LockSubject, LockRequest>[] = [
  rule(
    'EINVAL',
    'unlock-flags',
    (_subject, { flags }) => hasOtherBits(flags, KVM_UNLOCK_MEM_ALL) && `unlock flags ${flags} are not 0 or 1 (all)`,
  ),
  { ...slotId, broken: (subject, request) => !unlocksAll(request) && slotId.broken(subject, request) },
  rule('EINVAL', 'unlock-absent', ({ slot }, request) => {
    if (unlocksAll(request)) return false;
    return !slot?.locked && `slot ${request.slot} ${slot ? 'is not locked' : 'is not there'}`;
  }),
];

/** What a request to change a slot means to a lock of it. */
export function changeOf(slot: MemslotState, request: RegionRequest, pageSize: number): LockedChange {
  const removes = isZero(request.memorySize);
  return {
    locked: slot.locked,
    removes,
    moves: !removes && toPages(request.guestPhysAddr, pageSize) !== slot.baseGfn,
    startsLog: (request.flags & ~slot.flags & KVM_MEM_LOG_DIRTY_PAGES) !== 0,
  };
}

export interface LockedChange {
  /** Of the slot as it is. */
  readonly locked: number;
  readonly removes: boolean;
  readonly moves: boolean;
  readonly startsLog: boolean;
}

/** What a locked slot does not let happen to itself. */
export const lockedSlotRules: readonly Rule<unknown, LockedChange>[] = [
  rule('EBUSY', 'slot-locked', (_subject, { locked, removes, moves }) => {
    return (
      locked !== 0 &&
      (removes || moves) &&
      `it is locked and cannot be ${removes ? 'removed' : 'moved'}: unlock it first`
    );
  }),
  rule('EPERM', 'slot-locked-log', (_subject, { locked, startsLog }) => {
    return (
      (locked & KVM_LOCK_MEM_WRITE) !== 0 &&
      startsLog &&
      'it is locked for writing, so its dirty pages cannot be logged'
    );
  }),
];

/** What the memory behind a slot has to be, page by page. */
export interface LockedRange {
  /** A page that nobody has mapped, or undefined. */
  readonly gap: U64 | undefined;
  /** A page that is mapped without the rights asked for, or undefined. */
  readonly denied: U64 | undefined;
  /** Bytes that the lock would add, those locked already, and the limit; Infinity for none. */
  readonly bytes: number;
  readonly locked: number;
  readonly limit: number;
}

export const lockedRangeRules: readonly Rule<unknown, LockedRange>[] = [
  rule('ENOMEM', 'lock-limit', (_subject, { bytes, locked, limit }) => {
    return (
      locked + bytes > limit &&
      `${bytes} bytes more would be locked, ${locked} are, and this process may lock ${limit} (RLIMIT_MEMLOCK)`
    );
  }),
  rule('ENOMEM', 'lock-gap', (_subject, { gap }) => gap !== undefined && `nothing is mapped at host address ${gap}`),
  rule(
    'EFAULT',
    'lock-denied',
    (_subject, { denied }) =>
      denied !== undefined && `the memory at host address ${denied} is not mapped with the rights asked for`,
  ),
];
