import { GiB, MiB } from '../../uapi.ts';
import { toPages } from '../arguments.ts';
import type { MemslotState, VmFile } from '../state.ts';
import { SoftwareGuestMemfd } from './software_files.ts';

const SIZES = [GiB, 2 * MiB];

/**
 * Bytes of the largest block around a guest page that KVM may map with one entry: inside one slot, in step with its memory, and with all pages
 * private or all shared. A block whose pages differ is mixed. 0 without a memslot. Contract §12.1.
 */
export function largestBlock(vm: VmFile, gfn: number): number {
  const { pageSize } = vm.machine;
  const slot = vm.slotOverlapping(0, gfn, gfn + 1);
  if (!slot) return 0;
  for (const size of SIZES) {
    const pages = size / pageSize;
    const start = gfn - (gfn % pages);
    const inside = slot.baseGfn <= start && start + pages <= slot.baseGfn + slot.pages;
    if (inside && isOneBlock(vm, slot, start, pages)) return size;
  }
  return pageSize;
}

function isOneBlock(vm: VmFile, slot: MemslotState, start: number, pages: number): boolean {
  const file = slot.guestMemfd;
  const inFile = (first: number): boolean => {
    const page = slot.pgoff + first - slot.baseGfn;
    if (page % pages !== 0 || !(file instanceof SoftwareGuestMemfd)) return false;
    const folio = file.folios?.at(page);
    return folio !== undefined && folio.start <= page && page + pages <= folio.end;
  };
  if (slot.gmemOnly) return inFile(start);
  const { attributes } = vm;
  if (attributes.covers(start, start + pages)) return vm.hasPrivate && inFile(start);
  const hostPage = toPages(slot.userspaceAddr, vm.machine.pageSize) + start - slot.baseGfn;
  return !attributes.overlaps(start, start + pages) && hostPage % pages === 0;
}
