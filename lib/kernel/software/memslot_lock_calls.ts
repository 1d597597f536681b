import { KVM_MEM_GUEST_MEMFD, KVM_MEM_READONLY, PROT_READ, PROT_WRITE } from '../../uapi.ts';
import { KVM_LOCK_MEM_WRITE, KVM_LOCK_MEMORY_REGION, KVM_UNLOCK_MEM_ALL } from '../../uapi_proposed.ts';
import { low32 } from '../arguments.ts';
import type { Result } from '../kernel.ts';
import {
  type LockRequest,
  type LockSubject,
  lockActionRules,
  lockBoundRules,
  lockedRangeRules,
  lockRules,
  unlockRules,
} from '../rules/memslot_lock.ts';
import type { EnableCapRequest } from '../rules/vm.ts';
import type { MemslotState, VmFile } from '../state.ts';
import { LinkCalls } from './link_calls.ts';
import type { Mapping } from './mapping.ts';
import { Stage2 } from './stage2.ts';

/** Pages of a mapping behind a slot, from gfn on. */
interface Piece {
  readonly mapping: Mapping;
  readonly page: number;
  readonly pages: number;
  readonly gfn: number;
}

/** The proposed locks of memslots: pages that are pinned where they are and mapped for the guest. */
export abstract class MemslotLockCalls extends LinkCalls {
  protected enableMemslotLock(vm: VmFile, { flags, args }: EnableCapRequest): Result {
    const refused = this.check(lockActionRules, null, { action: flags, rest: args.slice(2) });
    if (refused !== null) return refused;
    const request: LockRequest = { slot: args[0], flags: args[1] };
    return flags === KVM_LOCK_MEMORY_REGION ? this.#lock(vm, request) : this.#unlock(vm, request);
  }

  #lock(vm: VmFile, request: LockRequest): Result {
    const slot = vm.slot(0, Number(request.slot));
    const refused = this.check(lockRules, this.#subject(vm, slot), request);
    if (refused !== null || !slot) return refused ?? 0;
    const bound = this.check(lockBoundRules, { bound: (slot.flags & KVM_MEM_GUEST_MEMFD) !== 0 }, request);
    if (bound !== null) return bound;
    const writable = (low32(request.flags) & KVM_LOCK_MEM_WRITE) !== 0;
    const { pieces, gap, denied } = this.#pieces(slot, writable ? PROT_READ | PROT_WRITE : PROT_READ);
    const unfit = this.check(lockedRangeRules, null, {
      gap,
      denied,
      bytes: slot.pages * this.pageSize,
      locked: this.memory.lockedPages * this.pageSize,
      limit: this.machine.lockLimit,
    });
    if (unfit !== null) return unfit;
    for (const { mapping, page, pages, gfn } of pieces) {
      // A pin takes a page of one's own also for reading.
      this.memory.populate(mapping, page, page + pages, mapping.permits(page, PROT_WRITE) ? PROT_WRITE : PROT_READ);
      const place = { slot, store: mapping.store, shift: mapping.pgoff + page - gfn };
      Stage2.of(vm).map(gfn, gfn + pages, place, writable);
    }
    slot.locked = low32(request.flags);
    vm.lockedPages += slot.pages;
    this.memory.countLocks(vm);
    return 0;
  }

  #unlock(vm: VmFile, request: LockRequest): Result {
    const slot = vm.slot(0, Number(request.slot));
    const refused = this.check(unlockRules, this.#subject(vm, slot), request);
    if (refused !== null) return refused;
    for (const one of low32(request.flags) & KVM_UNLOCK_MEM_ALL ? vm.slots() : slot ? [slot] : []) {
      if (one.locked !== 0) vm.lockedPages -= one.pages;
      one.locked = 0;
    }
    return 0;
  }

  #subject(vm: VmFile, slot: MemslotState | undefined): LockSubject {
    return {
      slots: this.machine.userSlots,
      slot: slot
        ? {
            readonly: (slot.flags & KVM_MEM_READONLY) !== 0,
            logsDirtyPages: slot.dirty !== null,
            locked: slot.locked,
          }
        : null,
      running: this.runningOf(vm),
    };
  }

  /** The memory that a slot's host address names, or the first page of it that is not there or not for this. */
  #pieces(slot: MemslotState, prot: number): { pieces: Piece[]; gap: bigint | undefined; denied: bigint | undefined } {
    const pieces: Piece[] = [];
    let denied: bigint | undefined;
    for (let done = 0; done < slot.pages; ) {
      const address = BigInt(slot.userspaceAddr) + BigInt(done * this.pageSize);
      const found = this.memory.find(address);
      if (!found) return { pieces, gap: address, denied };
      const { mapping } = found;
      const page = found.offset / this.pageSize;
      const pages = Math.min(mapping.pages - page, slot.pages - done);
      const fit = mapping.secret ? 0 : mapping.accessible(page, page + pages, prot);
      if (fit < pages) denied ??= address + BigInt(fit * this.pageSize);
      pieces.push({ mapping, page, pages, gfn: slot.baseGfn + done });
      done += pages;
    }
    return { pieces, gap: undefined, denied };
  }
}
