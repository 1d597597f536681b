import { RangeMap } from '../../ranges.ts';
import {
  ERRNO,
  MADV_COLD,
  MADV_COLLAPSE,
  MADV_DONTNEED,
  MADV_DONTNEED_LOCKED,
  MADV_FREE,
  MADV_GUARD_INSTALL,
  MADV_GUARD_REMOVE,
  MADV_NORMAL,
  MADV_PAGEOUT,
  MADV_POPULATE_READ,
  MADV_POPULATE_WRITE,
  MADV_REMOVE,
  MADV_WIPEONFORK,
  MiB,
  MPOL_BIND,
  MPOL_DEFAULT,
  MPOL_INTERLEAVE,
  MPOL_LOCAL,
  MPOL_PREFERRED,
  MPOL_PREFERRED_MANY,
  MPOL_WEIGHTED_INTERLEAVE,
  PROT_EXEC,
  PROT_READ,
  PROT_SEM,
  PROT_WRITE,
} from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import type { Machine } from '../machine.ts';
import type { VmFile } from '../state.ts';
import { copyMapping, type MappedFile, Mapping } from './mapping.ts';
import type { PageStore } from './page_store.ts';
import { SecretFile } from './software_files.ts';

/** Whether madvise(2) knows the advice at all. */
export function isAdvice(machine: Machine, advice: number): boolean {
  const inRange = (first: number, last: number): boolean => advice >= first && advice <= last;
  return (
    inRange(MADV_NORMAL, MADV_DONTNEED) ||
    inRange(MADV_FREE, MADV_COLLAPSE) ||
    // Linux 6.13.
    (machine.since('6.18') && inRange(MADV_GUARD_INSTALL, MADV_GUARD_REMOVE))
  );
}

/** The mappings of one process, under handles; what mmap(2) and its relatives do once their arguments are in order. */
export class AddressSpace {
  readonly #machine: Machine;
  readonly #mappings: (Mapping | undefined)[] = [];
  readonly #free: number[] = [];
  /** Host page number → mapping. */
  readonly #addresses = new RangeMap<Mapping>();
  /** Where the bytes of a window's buffer lie in the mapping's store. */
  readonly #buffers = new WeakMap<ArrayBufferLike, { mapping: Mapping; shift: number }>();
  readonly #lockingVms = new Set<VmFile>();
  /** Those whose pages count, also for the children of this process. */
  #secrets = new Set<SecretFile>();
  #next: number;

  constructor(machine: Machine) {
    this.#machine = machine;
    this.#next = Number(machine.mmapEnd / BigInt(machine.pageSize));
  }

  get(handle: number): Mapping | undefined {
    return this.#mappings[handle];
  }

  /** @returns a handle, or -ENOMEM where no room is left. */
  map(pages: number, shared: boolean, file: MappedFile | null, pgoff: number, prot: number, yields = false): Result {
    const { pageSize } = this.#machine;
    const first = this.#room(pages);
    if (first === null) return -ERRNO.ENOMEM;
    const address = BigInt(first) * BigInt(pageSize);
    const mapping = new Mapping(address, pages, shared, file, pgoff, pageSize, prot, yields);
    this.#addresses.set(first, first + pages, mapping);
    if (mapping.secret && !this.#countsSecrets) mapping.locked.set(0, pages, true);
    const handle = this.#free.pop() ?? this.#mappings.length;
    this.#mappings[handle] = mapping;
    return handle;
  }

  unmap(handle: number): Result {
    const mapping = this.#mappings[handle];
    if (!mapping) return -ERRNO.ENOMEM;
    for (const { start, end } of mapping.windows) mapping.store.detach(start, end - start);
    const first = Number(mapping.address / BigInt(this.#machine.pageSize));
    this.#addresses.delete(first, first + mapping.pages);
    this.#mappings[handle] = undefined;
    this.#free.push(handle);
    mapping.userfault?.file.forget(mapping);
    mapping.drop();
    return 0;
  }

  /** A child's copy: the bytes of shared mappings are shared, those of private ones copied, and each has its own of everything else. */
  fork(): AddressSpace {
    const child = new AddressSpace(this.#machine);
    const { pageSize } = this.#machine;
    child.#next = this.#next;
    child.#free.push(...this.#free);
    child.#secrets = this.#secrets;
    this.#mappings.forEach((mapping, handle) => {
      const copy = mapping && copyMapping(mapping, pageSize);
      child.#mappings[handle] = copy;
      if (!copy) return;
      const first = Number(copy.address / BigInt(pageSize));
      child.#addresses.set(first, first + copy.pages, copy);
    });
    return child;
  }

  peek(mapping: Mapping, offset: number, target: Uint8Array): Result {
    return this.#copy(mapping, offset, target.length, PROT_READ, (at, length) => {
      this.#noteZeros(mapping, at, length);
      this.#fillPrivate(mapping, at, length);
      mapping.store.read(at, target.subarray(0, length));
      mapping.store.touch(Math.floor(at / this.#machine.pageSize), Math.ceil((at + length) / this.#machine.pageSize));
    });
  }

  poke(mapping: Mapping, offset: number, source: Uint8Array): Result {
    return this.#copy(mapping, offset, source.length, PROT_WRITE, (at, length) => {
      this.#fillPrivate(mapping, at, length);
      const { pageSize } = this.#machine;
      mapping.zeros.delete(Math.floor(at / pageSize), Math.ceil((at + length) / pageSize));
      mapping.store.write(at, source.subarray(0, length));
    });
  }

  /** Pages that a touch reaches exist afterwards: mlock, MADV_POPULATE, MAP_POPULATE. @returns whether all could be reached. */
  populate(mapping: Mapping, start: number, end: number, prot: number): boolean {
    const count = mapping.reachable(start, this.#settled(mapping, start, end), prot);
    const { pageSize } = this.#machine;
    const written =
      prot === PROT_WRITE ? [{ start, end: start + count }] : [...mapping.locked.within(start, start + count)];
    if (prot !== PROT_WRITE) this.#noteZeros(mapping, (mapping.pgoff + start) * pageSize, count * pageSize);
    for (const range of written) mapping.zeros.delete(mapping.pgoff + range.start, mapping.pgoff + range.end);
    this.#fillPrivate(mapping, (mapping.pgoff + start) * pageSize, count * pageSize);
    mapping.store.touch(mapping.pgoff + start, mapping.pgoff + start + count);
    mapping.faulted?.set(mapping.pgoff + start, mapping.pgoff + start + count, true);
    return count === end - start;
  }

  protect(mapping: Mapping, start: number, end: number, prot: number): Result {
    if (prot & ~(PROT_READ | PROT_WRITE | PROT_EXEC | PROT_SEM)) return -ERRNO.EINVAL;
    if (prot & PROT_EXEC && mapping.gmem) return -ERRNO.EACCES;
    mapping.protection.set(start, end, prot);
    return 0;
  }

  /** Contract §8.3, for an advice there is. */
  advise(mapping: Mapping, start: number, end: number, advice: number): Result {
    const { gmem, store, pgoff } = mapping;
    const anonymous = !mapping.file;
    // Linux goes through the range from its start, and stops where it may not go on.
    const unlocked = [...mapping.locked.within(start, end)][0]?.start ?? end;
    switch (advice) {
      case MADV_DONTNEED:
      case MADV_DONTNEED_LOCKED:
        if (mapping.shared) store.unmap(pgoff + start, pgoff + (advice === MADV_DONTNEED ? unlocked : end));
        if (!mapping.shared) store.discard(pgoff + start, pgoff + (advice === MADV_DONTNEED ? unlocked : end));
        mapping.faulted?.delete(pgoff + start, pgoff + (advice === MADV_DONTNEED ? unlocked : end));
        return advice === MADV_DONTNEED && unlocked < end ? -ERRNO.EINVAL : 0;
      case MADV_REMOVE: {
        if (!mapping.file) return -ERRNO.EINVAL;
        if (!mapping.shared) return unlocked === start ? -ERRNO.EINVAL : -ERRNO.EACCES;
        if (mapping.secret && unlocked > start) return -ERRNO.EOPNOTSUPP;
        const punched = gmem ? gmem.punch(pgoff + start, pgoff + unlocked) : 0;
        if (!gmem) store.discard(pgoff + start, pgoff + unlocked);
        return unlocked < end ? -ERRNO.EINVAL : punched;
      }
      case MADV_COLD:
      case MADV_PAGEOUT:
        return unlocked < end ? -ERRNO.EINVAL : 0;
      case MADV_FREE:
        return anonymous && !mapping.shared && unlocked === end ? 0 : -ERRNO.EINVAL;
      case MADV_WIPEONFORK:
        return anonymous && !mapping.shared ? 0 : -ERRNO.EINVAL;
      case MADV_COLLAPSE:
        return gmem || !this.#hasHugePage(mapping, start, end) ? -ERRNO.EINVAL : 0;
      case MADV_POPULATE_READ:
      case MADV_POPULATE_WRITE: {
        if (mapping.secret) return -ERRNO.EINVAL;
        const prot = advice === MADV_POPULATE_READ ? PROT_READ : PROT_WRITE;
        const refused = [...mapping.protection.within(start, end)].find((range) => (range.value & prot) !== prot);
        const permitted = refused?.start ?? end;
        if (!this.populate(mapping, start, permitted, prot)) return -ERRNO.EFAULT;
        return permitted < end ? -ERRNO.EINVAL : 0;
      }
      case MADV_GUARD_INSTALL:
      case MADV_GUARD_REMOVE:
        if (advice === MADV_GUARD_REMOVE) mapping.guards.delete(start, end);
        else {
          mapping.guards.set(start, unlocked, true);
          if (!mapping.shared) store.discard(pgoff + start, pgoff + unlocked);
        }
        return advice === MADV_GUARD_INSTALL && unlocked < end ? -ERRNO.EINVAL : 0;
      default:
        // What is left changes nothing that can be seen: reclaim hints, fork and dump policy, huge pages, KSM.
        return 0;
    }
  }

  /** Whether the range has 2 MiB that begin at a multiple of 2 MiB. */
  #hasHugePage(mapping: Mapping, start: number, end: number): boolean {
    const pages = (2 * MiB) / this.#machine.pageSize;
    const first = Number(mapping.address / BigInt(this.#machine.pageSize)) + start;
    return Math.ceil(first / pages) * pages + pages <= first + end - start;
  }

  /** @param onFault Touches nothing. */
  lock(mapping: Mapping, start: number, end: number, onFault = false): Result {
    if (this.#machine.lockLimit === 0) return -ERRNO.EPERM;
    if (!this.mayLock(end - start - mapping.locked.lengthWithin(start, end))) return -ERRNO.ENOMEM;
    // As locked as it is; and the kernel may not touch it.
    if (mapping.secret) return -ERRNO.ENOMEM;
    mapping.locked.set(start, end, true);
    return onFault || this.populate(mapping, start, end, PROT_READ) ? 0 : -ERRNO.ENOMEM;
  }

  /** Whether RLIMIT_MEMLOCK leaves room for so many pages more. */
  mayLock(pages: number): boolean {
    const { lockLimit, pageSize } = this.#machine;
    return lockLimit === Number.POSITIVE_INFINITY || (this.lockedPages + pages) * pageSize <= lockLimit;
  }

  /** Pages that count as locked, by this process and by its VMs. */
  get lockedPages(): number {
    let pages = 0;
    for (const vm of this.#lockingVms) pages += vm.lockedPages;
    for (const mapping of this.#mappings) pages += mapping?.locked.lengthWithin(0, mapping.pages) ?? 0;
    return pages;
  }

  /** A VM that locks pages of this process, for as long as it is there. */
  countLocks(vm: VmFile): void {
    for (const other of this.#lockingVms) if (other.lockedPages === 0) this.#lockingVms.delete(other);
    this.#lockingVms.add(vm);
  }

  residency(mapping: Mapping, start: number, end: number, target: Uint8Array): void {
    mapping.store.residency(mapping.pgoff + start, mapping.pgoff + end, target);
    if (mapping.shared || !mapping.file) return;
    // What a private mapping has no copy of is the file's.
    const ofFile = new Uint8Array(end - start);
    mapping.file.store.residency(mapping.pgoff + start, mapping.pgoff + end, ofFile);
    for (const [index, resident] of ofFile.entries()) if (resident) target[index] = 1;
  }

  /** One NUMA node, number 0. */
  bind(mapping: Mapping, start: number, end: number, policy: number, nodes: readonly number[]): Result {
    const needsNodes = [MPOL_BIND, MPOL_INTERLEAVE, MPOL_PREFERRED_MANY, MPOL_WEIGHTED_INTERLEAVE].includes(policy);
    const takesNodes = needsNodes || policy === MPOL_PREFERRED;
    if (policy < MPOL_DEFAULT || policy > MPOL_WEIGHTED_INTERLEAVE) return -ERRNO.EINVAL;
    if (nodes.some((node) => node !== 0) || (needsNodes && nodes.length === 0) || (!takesNodes && nodes.length > 0))
      return -ERRNO.EINVAL;
    const stored = policy === MPOL_PREFERRED && nodes.length === 0 ? MPOL_LOCAL : policy;
    const [policies, shift] = this.#policies(mapping);
    policies.set(shift + start, shift + end, stored);
    return 0;
  }

  policyAt(mapping: Mapping, page: number): number {
    const [policies, shift] = this.#policies(mapping);
    return policies.get(shift + page) ?? MPOL_DEFAULT;
  }

  window(mapping: Mapping, offset: number, length: number): Uint8Array | null {
    const at = mapping.pgoff * this.#machine.pageSize + offset;
    this.#fillPrivate(mapping, at, length);
    const view = mapping.store.window(at, length, !mapping.yields);
    if (!view) return null;
    mapping.zeros.delete(Math.floor(at / this.#machine.pageSize), Math.ceil((at + length) / this.#machine.pageSize));
    mapping.windows.set(at, at + length, true);
    this.#buffers.set(view.buffer, { mapping, shift: at - view.byteOffset });
    return view;
  }

  /** Detaches a view, and with it those that share its buffer: plain JavaScript cannot have one memory in two buffers. */
  releaseWindow(view: Uint8Array): void {
    const found = this.#buffers.get(view.buffer);
    if (found && view.length > 0) found.mapping.store.detach(view.byteOffset + found.shift, view.length);
  }

  releaseWindows(handle: number): Result {
    const mapping = this.#mappings[handle];
    if (!mapping) return -ERRNO.ENOMEM;
    for (const { start, end } of mapping.windows) mapping.store.detach(start, end - start);
    mapping.windows.clear();
    return 0;
  }

  isWindow(buffer: Uint8Array): boolean {
    return this.#buffers.has(buffer.buffer);
  }

  /** How many bytes of a buffer given to a call a touch reaches: all of ordinary memory, and of a window the pages that are there. */
  touchable(buffer: Uint8Array): number {
    const found = this.#buffers.get(buffer.buffer);
    if (!found) return buffer.length;
    const { mapping, shift } = found;
    const { pageSize } = this.#machine;
    const offset = buffer.byteOffset + shift - mapping.pgoff * pageSize;
    const start = Math.floor(offset / pageSize);
    const pages = mapping.accessible(start, Math.ceil((offset + buffer.length) / pageSize), PROT_READ);
    return Math.max(0, Math.min(buffer.length, (start + pages) * pageSize - offset));
  }

  /** Whether the page of a mapping exists and is its own, so that a guest's access would find it rather than make it. */
  isPresent(mapping: Mapping, page: number): boolean {
    if (mapping.zeros.get(mapping.pgoff + page)) return false;
    return mapping.store.residentPages(mapping.pgoff + page, mapping.pgoff + page + 1) > 0;
  }

  /** The mapping and byte offset behind a host address. */
  find(address: bigint): { mapping: Mapping; offset: number } | undefined {
    const range = this.#addresses.rangeAt(Number(address / BigInt(this.#machine.pageSize)));
    return range && { mapping: range.value, offset: Number(address - range.value.address) };
  }

  /** Since 6.19 a guest_memfd keeps its policy by file offset; before, and elsewhere, it is the mapping's. Contract §8.3. */
  #policies(mapping: Mapping): [RangeMap<number>, number] {
    return mapping.gmem && this.#machine.since('6.19') ? [mapping.gmem.policy, mapping.pgoff] : [mapping.policy, 0];
  }

  #copy(
    mapping: Mapping,
    offset: number,
    length: number,
    prot: number,
    copy: (at: number, length: number) => void,
  ): Result {
    if (length === 0) return 0;
    const { pageSize } = this.#machine;
    const page = Math.floor(offset / pageSize);
    const wanted = this.#settled(mapping, page, Math.ceil((offset + length) / pageSize));
    const end = this.#affordable(mapping, page, wanted);
    const reach = (page + mapping.accessible(page, end, prot)) * pageSize - offset;
    if (reach <= 0) return -ERRNO.EFAULT;
    const count = Math.min(length, reach);
    const at = mapping.pgoff * pageSize + offset;
    copy(at, count);
    mapping.faulted?.set(Math.floor(at / pageSize), Math.ceil((at + count) / pageSize), true);
    return count;
  }

  /** Waits for pages that a userfaultfd is to make. @returns up to where they are there. */
  #settled(mapping: Mapping, start: number, end: number): number {
    if (!mapping.userfault) return end;
    const { pageSize } = this.#machine;
    for (const range of [...mapping.userfault.missing.within(start, end)]) {
      for (let page = range.start; page < range.end; page++) {
        if (!mapping.isMissing(page)) continue;
        mapping.userfault?.file.fault(mapping.address + BigInt(page * pageSize));
        if (mapping.isMissing(page)) return page;
      }
    }
    return end;
  }

  /** Linux 7.3 counts a secret page when it is touched, all of a user's together, and without room for it a touch is SIGBUS. */
  #affordable(mapping: Mapping, page: number, end: number): number {
    const { lockLimit, pageSize } = this.#machine;
    const { file, store, pgoff } = mapping;
    if (!(file instanceof SecretFile) || !this.#countsSecrets || lockLimit === Number.POSITIVE_INFINITY) return end;
    let left = Math.floor(lockLimit / pageSize);
    for (const other of this.#secrets) {
      const resident = other.store.residentPages(0, other.pages);
      if (resident === 0) this.#secrets.delete(other);
      left -= resident;
    }
    this.#secrets.add(file);
    let at = page;
    while (at < end && (store.residentPages(pgoff + at, pgoff + at + 1) > 0 || left-- > 0)) at++;
    return at;
  }

  /** Page by page against the user's limit; before, a mapping of secret memory counts as locked. */
  get #countsSecrets(): boolean {
    return this.#machine.since('7.3');
  }

  #noteZeros(mapping: Mapping, at: number, length: number): void {
    if (mapping.shared || mapping.file) return;
    const { pageSize } = this.#machine;
    const end = Math.ceil((at + length) / pageSize);
    let page = Math.floor(at / pageSize);
    for (const present of mapping.store.presentWithin(page, end)) {
      if (present.start > page) mapping.zeros.set(page, present.start, true);
      page = present.end;
    }
    if (page < end) mapping.zeros.set(page, end, true);
  }

  /** A private mapping of a file starts with the file's bytes and keeps its own from the first touch on. */
  #fillPrivate(mapping: Mapping, at: number, length: number): void {
    if (mapping.shared || !mapping.file) return;
    const { pageSize } = this.#machine;
    const page = new Uint8Array(pageSize);
    const missing = [...gaps(mapping.store, Math.floor(at / pageSize), Math.ceil((at + length) / pageSize))];
    for (const number of missing) {
      mapping.file.store.touch(number, number + 1);
      mapping.file.store.read(number * pageSize, page);
      mapping.store.write(number * pageSize, page);
    }
  }

  /** Top down, as Linux does; first fit once the bottom is reached. */
  #room(pages: number): number | null {
    const guard = 1;
    const lowest = 0x10000 / this.#machine.pageSize + 1;
    if (this.#next - pages - guard >= lowest) {
      this.#next -= pages + guard;
      return this.#next;
    }
    const top = Number(this.#machine.mmapEnd / BigInt(this.#machine.pageSize));
    for (const { start, end } of this.#addresses.gaps(lowest, top)) {
      if (end - start >= pages + 2 * guard) return start + guard;
    }
    return null;
  }
}

function* gaps(store: PageStore, start: number, end: number): Generator<number> {
  let page = start;
  for (const range of store.presentWithin(start, end)) {
    for (; page < range.start; page++) yield page;
    page = range.end;
  }
  for (; page < end; page++) yield page;
}
