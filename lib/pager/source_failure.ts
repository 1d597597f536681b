import type { PageSourceFailedExit } from '../exit.ts';
import type { Vm } from '../vm.ts';

/**
 * Whether a vCPU's access may have failed because a page will never come: it found no memory where a memslot is, of which not all pages came.
 *
 * @param address Guest physical address of the access, where it is known.
 */
export function sourceFailure(vm: Vm, address?: number): PageSourceFailedExit | null {
  const at = address === undefined ? null : vm.memslotAt(address);
  for (const slot of at === null ? vm.memslots.values() : at ? [at] : []) {
    const failure = slot.hostMemory?.backing.paging()?.failure();
    if (!failure) continue;
    const { error, range } = failure;
    // The slot need not show where it was.
    const inside = range.offset >= slot.hostOffset && range.offset < slot.hostOffset + slot.size;
    const place = inside ? slot.address + range.offset - slot.hostOffset : slot.address;
    return { reason: 'page-source-failed', address: place, size: range.size, error };
  }
  return null;
}
