import { RangeMap } from '../../ranges.ts';
import { ERRNO, KVM_MEM_READONLY, PROT_READ, PROT_WRITE } from '../../uapi.ts';
import type { MemslotState, VmFile } from '../state.ts';
import type { AddressSpace } from './address_space.ts';
import type { Access, GuestBus } from './executor.ts';
import { MemoryFile } from './memory_file.ts';
import type { PageStore } from './page_store.ts';
import { ProtectedPages, type TakenPages } from './protected_pages.ts';
import { SoftwareGuestMemfd } from './software_files.ts';
import { type Place, Stage2 } from './stage2.ts';

const OK: Access = { kind: 'ok' };
/** kvm_run says nothing of it. */
const unexplained = (errno: number): Access => ({ kind: 'fault', errno, fault: null });

/** Which memory an access by a guest's CPU reaches. Contract §13.3; the same words as there. */
export class SoftwareBus implements GuestBus {
  readonly #vm: VmFile;
  readonly #memory: AddressSpace;
  readonly #stage2: Stage2;
  /** Faults that it took to map a page, of accesses by the guest itself. */
  faults = 0;

  constructor(vm: VmFile, memory: AddressSpace) {
    this.#vm = vm;
    this.#memory = memory;
    this.#stage2 = Stage2.of(vm);
  }

  read(gpa: number, target: Uint8Array): Access & { readonly done: number } {
    return this.#pages(gpa, target, false);
  }

  write(gpa: number, source: Uint8Array): Access & { readonly done: number } {
    return this.#pages(gpa, source, true);
  }

  /** Maps a page as KVM_PRE_FAULT_MEMORY does: a read of the kind that the attribute says. */
  preFault(gpa: number): Access {
    const { faults } = this;
    const access = this.#page(gpa, new Uint8Array(1), false);
    this.faults = faults;
    return access;
  }

  #pages(gpa: number, bytes: Uint8Array, write: boolean): Access & { readonly done: number } {
    const { pageSize } = this.#vm.machine;
    for (let done = 0; done < bytes.length; ) {
      const at = gpa + done;
      const length = Math.min(bytes.length - done, pageSize - (at % pageSize));
      const access = this.#page(at, bytes.subarray(done, done + length), write);
      if (access.kind !== 'ok') return { ...access, done };
      done += length;
    }
    return { ...OK, done: bytes.length };
  }

  #page(gpa: number, bytes: Uint8Array, write: boolean): Access {
    const { pageSize } = this.#vm.machine;
    const gfn = Math.floor(gpa / pageSize);
    const slot = this.#vm.slotOverlapping(0, gfn, gfn + 1);
    const secret = this.#isPrivate(slot, gfn);
    const wanted = this.#vm.guestView?.get(gfn) ?? secret;
    if (wanted !== secret) return this.#fault(ERRNO.EFAULT, gpa, wanted);
    if (!slot) return secret ? this.#fault(ERRNO.EFAULT, gpa, true) : { kind: 'mmio', gpa };
    // Without hardware paging every instruction is emulated, and the emulator knows host addresses only. Contract §13.5, §13.6.
    if (!this.#vm.machine.tdp) {
      const access = write && slot.flags & KVM_MEM_READONLY ? null : this.#fromHost(slot, gpa, bytes, write);
      return access?.kind === 'ok' ? access : { kind: 'mmio', gpa };
    }
    if (this.#vm.isProtected && !this.#vm.convertsInPlace) return this.#fromTaken(slot, gpa, bytes, write);
    if (secret || slot.gmemOnly) return this.#fromFile(slot, gpa, secret, bytes, write);
    if (write && slot.flags & KVM_MEM_READONLY) return { kind: 'mmio', gpa };
    return this.#fromHost(slot, gpa, bytes, write);
  }

  /** The file of a slot decides where pages are converted in place, the attribute of the VM everywhere else. */
  #isPrivate(slot: MemslotState | undefined, gfn: number): boolean {
    if (slot?.gmemOnly && slot.guestMemfd && this.#vm.convertsInPlace)
      return slot.guestMemfd.privatePages.get(slot.pgoff + gfn - slot.baseGfn) === true;
    return this.#vm.hasPrivate && this.#vm.attributes.get(gfn) === true;
  }

  #fromFile(slot: MemslotState, gpa: number, secret: boolean, bytes: Uint8Array, write: boolean): Access {
    const file = slot.guestMemfd;
    if (!(file instanceof SoftwareGuestMemfd)) return this.#fault(ERRNO.EFAULT, gpa, secret);
    const { pageSize } = this.#vm.machine;
    const offset = slot.pgoff * pageSize + gpa - slot.baseGfn * pageSize;
    this.#touch(gpa, { slot, store: file.store, shift: slot.pgoff - slot.baseGfn }, write, true);
    if (write) file.store.write(offset, bytes);
    else {
      file.store.touch(Math.floor(offset / pageSize), Math.floor(offset / pageSize) + 1);
      file.store.read(offset, bytes);
    }
    return OK;
  }

  #fromHost(slot: MemslotState, gpa: number, bytes: Uint8Array, write: boolean): Access {
    const { pageSize } = this.#vm.machine;
    const inSlot = gpa - slot.baseGfn * pageSize;
    const found = this.#memory.find(BigInt(slot.userspaceAddr) + BigInt(inSlot));
    const unreachable = unexplained(ERRNO.EFAULT);
    if (!found) return unreachable;
    const page = Math.floor(found.offset / pageSize);
    // The kernel maps a page of a writable slot writable where it can, and a read of a page without write permission still works.
    const needed = write ? PROT_WRITE : PROT_READ;
    if (found.mapping.store.taken.get(found.mapping.pgoff + page)) return unexplained(ERRNO.EPERM);
    if (!found.mapping.permits(page, needed) || found.mapping.accessible(page, page + 1, needed) === 0)
      return unreachable;
    const index = Math.floor(inSlot / pageSize);
    slot.mapped ??= new RangeMap();
    // On x86 with hardware paging a first read maps a page that is there writable at once, and counts as a write. Contract §16.
    const mapsWritable =
      this.#vm.machine.tdp &&
      !this.#vm.machine.isArm &&
      !(slot.flags & KVM_MEM_READONLY) &&
      !slot.mapped.get(index) &&
      found.mapping.accessible(page, page + 1, PROT_READ | PROT_WRITE) > 0;
    const { mapping } = found;
    const shift = mapping.pgoff + page - Math.floor(gpa / pageSize);
    const isWritable =
      !slot.dirty &&
      !(slot.flags & KVM_MEM_READONLY) &&
      mapping.accessible(page, page + 1, PROT_READ | PROT_WRITE) > 0 &&
      this.#memory.isPresent(mapping, page);
    const dirties = slot.dirty && (write || (mapsWritable && this.#memory.isPresent(found.mapping, page)));
    const result = write
      ? this.#memory.poke(found.mapping, found.offset, bytes)
      : this.#memory.peek(found.mapping, found.offset, bytes);
    if (result < bytes.length) return unreachable;
    if (this.#vm.machine.tdp) this.#touch(gpa, { slot, store: mapping.store, shift }, write, isWritable);
    if (dirties) slot.dirty?.set(index, index + 1, true);
    // What the host has not touched is a page of zeros that all share: the host's first write takes it away from the guest.
    if (this.#memory.isPresent(mapping, page)) slot.mapped.set(index, index + 1, true);
    if (this.#vm.machine.pkvm) mapping.store.guests.add(this.#vm);
    return OK;
  }

  /** A protected guest has no use for a file. It takes the host's memory page by page, and keeps it, whatever the host does. Contract §17.1. */
  #fromTaken(slot: MemslotState, gpa: number, bytes: Uint8Array, write: boolean): Access {
    const { pageSize } = this.#vm.machine;
    const gfn = Math.floor(gpa / pageSize);
    const taken = ProtectedPages.of(this.#vm).at(gfn) ?? this.#take(slot, gfn);
    if ('kind' in taken) return taken;
    if (taken.hold === 'lost') return unexplained(ERRNO.EFAULT);
    const offset = gpa + taken.shift * pageSize;
    if (write) taken.store.write(offset, bytes);
    else taken.store.read(offset, bytes);
    return OK;
  }

  #take(slot: MemslotState, gfn: number): TakenPages | Access {
    const { pageSize } = this.#vm.machine;
    const found = this.#memory.find(BigInt(slot.userspaceAddr) + BigInt((gfn - slot.baseGfn) * pageSize));
    if (!this.#memory.mayLock(1)) return unexplained(ERRNO.ENOMEM);
    if (!found) return unexplained(ERRNO.EFAULT);
    const { mapping, offset } = found;
    const page = Math.floor(offset / pageSize);
    // It is pinned for writing, whatever the guest wants of it.
    if (!mapping.permits(page, PROT_WRITE) || mapping.secret) return unexplained(ERRNO.EFAULT);
    const place = mapping.pgoff + page;
    const lent = this.#memory.isPresent(mapping, page) && this.#isMapped(mapping.store, place);
    if (!this.#memory.populate(mapping, page, page + 1, PROT_WRITE)) return unexplained(ERRNO.EFAULT);
    if (mapping.shared && mapping.file && !(mapping.file instanceof MemoryFile && mapping.file.isShmem))
      return unexplained(ERRNO.EIO);
    if (lent || mapping.store.taken.get(place)) return unexplained(ERRNO.EPERM);
    this.#vm.lockedPages++;
    this.#memory.countLocks(this.#vm);
    this.faults++;
    return ProtectedPages.of(this.#vm).take(gfn, mapping.store, place);
  }

  /** On a protected host, memory that an ordinary guest has mapped cannot be taken. */
  #isMapped(store: PageStore, page: number): boolean {
    for (const vm of store.guests) if (vm.ended) store.guests.delete(vm);
    return [...store.guests].some((vm) => Stage2.of(vm).maps(store, page));
  }

  /** Without a mapping, or with one that is for reading only, an access faults first. */
  #touch(gpa: number, place: Place, write: boolean, isWritable: boolean): void {
    const gfn = Math.floor(gpa / this.#vm.machine.pageSize);
    if (this.#stage2.has(gfn, place, write)) return;
    this.faults++;
    this.#stage2.map(gfn, gfn + 1, place, write || isWritable);
  }

  #fault(errno: number, gpa: number, secret: boolean): Access {
    return { kind: 'fault', errno, fault: { gpa, private: secret } };
  }
}
