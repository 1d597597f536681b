import { RangeMap } from '../../ranges.ts';
import { ERRNO } from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import { OpenFile } from '../state.ts';
import type { Mapping } from './mapping.ts';

/** A userfaultfd. The kernel lives on one thread, so what serves its faults runs inside the access that waits. */
export class UserfaultFile extends OpenFile {
  features: bigint | null = null;
  /** Where accesses wait. */
  readonly addresses: bigint[] = [];
  serve: (() => void) | null = null;
  readonly #mappings = new Set<Mapping>();

  constructor() {
    super('uffd');
  }

  /** Pages of the mapping that are not there are this file's to make. */
  watch(mapping: Mapping, start: number, end: number): Result {
    if (mapping.userfault && mapping.userfault.file !== this) return -ERRNO.EBUSY;
    mapping.userfault ??= { file: this, missing: new RangeMap() };
    mapping.userfault.missing.set(start, end, true);
    this.#mappings.add(mapping);
    return 0;
  }

  forget(mapping: Mapping): void {
    mapping.userfault = null;
    this.#mappings.delete(mapping);
  }

  /** Makes pages, up to the first that is there. @param make With bytes of the store. */
  fill(mapping: Mapping, start: number, end: number, make: (offset: number, length: number) => void): Result {
    const { store, pgoff } = mapping;
    const { pageSize } = store;
    if (mapping.userfault?.file !== this || !mapping.userfault.missing.covers(start, end)) return -ERRNO.ENOENT;
    const [there] = store.presentWithin(pgoff + start, pgoff + end);
    const stop = there ? there.start - pgoff : end;
    if (stop === start) return -ERRNO.EEXIST;
    make((pgoff + start) * pageSize, (stop - start) * pageSize);
    return (stop - start) * pageSize;
  }

  fault(address: bigint): void {
    this.addresses.push(address);
    this.serve?.();
  }

  protected override released(): void {
    for (const mapping of this.#mappings) mapping.userfault = null;
  }
}
