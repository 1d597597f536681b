import { KvmError, systemError } from './errors.ts';
import { formatBytes } from './format.ts';
import type { GuestMemfd } from './guest_memfd.ts';
import type { Holds } from './holds.ts';
import type { HostMemory } from './host_memory.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import { type LockSubject, lockRules, unlockRules } from './kernel/rules/memslot_lock.ts';
import { check, type Violation } from './kernel/rules/rule.ts';
import type { Memslot, SlotOwner } from './memslot.ts';
import {
  ERRNO,
  errnoName,
  FALLOC_FL_KEEP_SIZE,
  MADV_POPULATE_READ,
  MADV_POPULATE_WRITE,
  MLOCK_ONFAULT,
  RLIMIT_MEMLOCK,
} from './uapi.ts';
import {
  KVM_CAP_PROPOSED,
  KVM_LOCK_MEM_READ,
  KVM_LOCK_MEM_WRITE,
  KVM_LOCK_MEMORY_REGION,
  KVM_UNLOCK_MEMORY_REGION,
} from './uapi_proposed.ts';

export const lockRights = ['read', 'read-write'] as const;
export type LockRights = (typeof lockRights)[number];

export interface LockReport {
  readonly rights: LockRights;
  /** Bytes of the slot that occupy memory now: all of it. */
  readonly residentBytes: number;
  /**
   * Whether the guest's own tables have every page, so that no access faults. Where they cannot be filled ahead (no hardware paging, arm64, a
   * kernel before 6.11), each page faults once, at the guest's first access, and stays. It takes a vCPU of this thread: where there is none yet, the first one fills them.
   */
  readonly guestMapped: boolean;
  /** Who holds the pages: KVM by the proposed capability, or this process by mlock2(2). */
  readonly by: 'kernel' | 'process';
}

/** A part of a slot, and which memory is behind it: what the guest sees there now. */
type Part =
  | { readonly host: HostMemory; readonly file: null; readonly offset: number; readonly size: number }
  | { readonly host: null; readonly file: GuestMemfd; readonly offset: number; readonly size: number };

function* partsOf(slot: Memslot, owner: SlotOwner): Generator<Part> {
  const { hostMemory: host, guestMemfd: file, address, size } = slot;
  const isPair = file !== null && !file.backing.gmemOnly;
  const secret = isPair && slot.slot < 0x10000 ? owner.vm.attributes.privateRanges({ address, size }) : [];
  let at = address;
  for (const range of [...secret, { address: address + size, size: 0 }]) {
    const [offset, length] = [at - address, range.address - at];
    if (length > 0 && file && !isPair) yield { host: null, file, offset: slot.guestMemfdOffset + offset, size: length };
    else if (length > 0 && host) yield { host, file: null, offset: slot.hostOffset + offset, size: length };
    if (range.size > 0 && file)
      yield { host: null, file, offset: slot.guestMemfdOffset + range.address - address, size: range.size };
    at = range.address + range.size;
  }
}

/** Bytes of what the guest sees in a slot that occupy memory. */
export function residentBytesOf(slot: Memslot, owner: SlotOwner): number {
  let bytes = 0;
  for (const { host, file, offset, size } of partsOf(slot, owner))
    bytes += (host ?? (file as GuestMemfd)).residentBytes({ offset, size });
  return bytes;
}

/** @throws KvmError with the errno of the rule */
export function refuse(violation: Violation | null, slot: Memslot): void {
  if (!violation) return;
  const code = errnoName(violation.errno);
  const message = `memslot ${slot.slot}: ${violation.sentence} (${code})`;
  throw new KvmError({ code, errno: -violation.errno, message });
}

function subjectOf(slot: Memslot, { vm, kernel, fd }: SlotOwner): LockSubject {
  return {
    slots: Number.POSITIVE_INFINITY,
    slot: { readonly: slot.readonly, logsDirtyPages: slot.logDirtyPages, locked: slot.locked ? 1 : 0 },
    running: vm.closed ? 0 : Math.max(0, kernel.runningVcpus(fd)),
  };
}

export function assertLockable(slot: Memslot, owner: SlotOwner, rights: LockRights): void {
  refuse(check(lockRules, subjectOf(slot, owner), { slot: slot.slot, flags: flagsOf(rights) }), slot);
}

export function assertLocked(slot: Memslot, owner: SlotOwner): void {
  refuse(check(unlockRules, subjectOf(slot, owner), { slot: slot.slot, flags: 0 }), slot);
}

export function flagsOf(rights: LockRights | false): number {
  if (!rights) return 0;
  return rights === 'read' ? KVM_LOCK_MEM_READ : KVM_LOCK_MEM_READ | KVM_LOCK_MEM_WRITE;
}

/** What a locked slot holds, until it is released. */
export class MemslotLock {
  readonly rights: LockRights;
  readonly by: LockReport['by'];
  guestMapped = false;
  readonly #releases: (() => void)[] = [];

  /** All of it or nothing. */
  constructor(slot: Memslot, owner: SlotOwner, rights: LockRights) {
    this.rights = rights;
    this.by = owner.vm.capabilities.memslotLock && !slot.guestMemfd && slot.slot < 0x10000 ? 'kernel' : 'process';
    try {
      for (const part of partsOf(slot, owner)) this.#hold(part, slot, owner.kernel);
      if (this.by === 'kernel') this.#lockByKernel(slot, owner);
      this.mapForGuest(slot, owner);
    } catch (error) {
      this.release();
      throw error;
    }
    if (slot.slot >= 0x10000) return;
    // Whoever converts it would take away what was promised.
    const hold = owner.holds.add(slot.address, slot.address + slot.size, `the lock of memslot ${slot.slot}`);
    this.#releases.push(() => owner.holds.delete(hold));
  }

  mapForGuest(slot: Memslot, owner: SlotOwner): void {
    this.guestMapped ||= this.by === 'kernel' || owner.preFault(slot);
  }

  release(): void {
    for (let release = this.#releases.pop(); release; release = this.#releases.pop()) release();
  }

  #lockByKernel({ slot }: Memslot, { kernel, fd }: SlotOwner): void {
    const cap = KVM_CAP_PROPOSED.ARM_LOCK_USER_MEMORY_REGION;
    const args = { cap, flags: KVM_LOCK_MEMORY_REGION, args: [slot, flagsOf(this.rights), 0, 0] };
    const result = kernel.enableCap(fd, args);
    if (result < 0) throw systemError(result, { syscall: 'ioctl', request: 'KVM_ENABLE_CAP', args }, kernel.explain());
    this.#releases.push(() => kernel.enableCap(fd, { cap, flags: KVM_UNLOCK_MEMORY_REGION, args: [slot, 0, 0, 0] }));
  }

  #hold({ host, file, offset, size }: Part, slot: Memslot, kernel: Kernel): void {
    const { locked } = (host ?? file).backing;
    const hold = locked.add(offset, offset + size, slot);
    this.#releases.push(() => locked.delete(hold));
    if (this.by === 'kernel') return;
    if (host) this.#releases.unshift(() => unlockHost(kernel, host, offset, size));
    if (host) lockHost(kernel, host, offset, size, this.rights);
    else if (file) allocate(kernel, file.backing.fd, offset, size);
  }
}

function allocate(kernel: Kernel, fd: number, offset: number, size: number): void {
  const result = kernel.fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, size);
  if (result < 0) throw systemError(result, { syscall: 'fallocate', args: { fd, offset, size } }, kernel.explain());
}

/** mlock(2) does not count, so what another slot has locked too stays locked. */
function unlockHost(kernel: Kernel, { backing: { mapping, locked } }: HostMemory, offset: number, size: number): void {
  for (const { start, end } of [...locked.free(offset, offset + size)]) kernel.munlock(mapping, start, end - start);
}

/** Every page there, and none to go: first the right to keep them, which is what a limit refuses, then the pages. */
function lockHost(kernel: Kernel, host: HostMemory, offset: number, size: number, rights: LockRights): void {
  const { mapping } = host.backing;
  const args = { offset, size };
  const locked = kernel.mlock2(mapping, offset, size, MLOCK_ONFAULT);
  if (locked < 0) throw lockError(kernel, locked, 'mlock2', size);
  // To read private memory is to find the one page of zeros that everybody has: a page of its own takes a write.
  const isPrivate = host.kind === 'anonymous';
  const advice = rights === 'read' && !isPrivate ? MADV_POPULATE_READ : MADV_POPULATE_WRITE;
  const populated = kernel.madvise(mapping, offset, size, advice);
  if (populated >= 0) return;
  // Before Linux 5.14 there is no such advice, and a lock that does not wait for a touch.
  if (populated === -ERRNO.EINVAL && kernel.mlock2(mapping, offset, size, 0) === 0) return;
  const reason =
    populated === -ERRNO.EFAULT ? 'a page of the slot cannot be touched: its file was cut, or it is poisoned' : null;
  throw systemError(populated, { syscall: 'madvise', args: { ...args, advice } }, reason ?? kernel.explain());
}

/** Locking that a limit refused: EPERM is what Linux says where nothing at all may be locked, EAGAIN where a mapping would be. */
export function lockError(kernel: Kernel, result: Result, syscall: string, size: number): KvmError {
  const limits: readonly number[] = [-ERRNO.ENOMEM, -ERRNO.EPERM, -ERRNO.EAGAIN];
  if (!limits.includes(result)) return systemError(result, { syscall, args: { size } }, kernel.explain());
  const limit: { cur?: bigint } = {};
  const known = kernel.getrlimit(RLIMIT_MEMLOCK, limit) >= 0 && limit.cur !== undefined && limit.cur < 1n << 53n;
  const allowed = known ? formatBytes(Number(limit.cur)) : 'an unknown amount';
  const reason = `${formatBytes(size)} cannot be locked: this process may lock ${allowed} in all (RLIMIT_MEMLOCK); raise it (ulimit -l, LimitMEMLOCK=) or give it CAP_IPC_LOCK`;
  return systemError(-ERRNO.ENOMEM, { syscall, args: { size } }, reason);
}

/** @throws KvmError `EBUSY` where a locked slot would lose its pages */
export function refuseIfLocked(locked: Holds<Memslot>, offset: number, size: number, what: string): void {
  const at = locked.first(offset, offset + size);
  if (at === undefined) return;
  const names = [...locked.holders(offset, offset + size)].map(({ slot }) => slot).join(', ');
  const message = `${what} cannot be given back at ${formatBytes(at)}: memslot ${names} is locked; unlock it first (EBUSY)`;
  throw new KvmError({ code: 'EBUSY', errno: -ERRNO.EBUSY, message });
}
