import type { GuestMemfd, GuestRange, Memslot, Visibility, Vm } from '../index.ts';
import { type Paint, place } from './text.ts';

/** One character of a bar: what of its bytes is private and shared, and what of that the host really holds. */
interface Cell {
  readonly size: Record<Visibility, number>;
  readonly held: Record<Visibility, number>;
  /** Held on the side the guest does not see. */
  stray: number;
}

interface Bar {
  readonly address: number;
  readonly size: number;
  readonly cells: readonly Cell[];
}

/** A picture of the guest's memory at one moment, all bars on one scale. */
export interface MemoryMap {
  /** Bytes of one character. */
  readonly scale: number;
  readonly bars: readonly Bar[];
}

const LONGEST_BAR = 52;
const LABEL = 11;

/** GUEST_MEMFD_FLAG_MMAP and _INIT_SHARED: the pages of the file are for both, host and guest. */
const BOTH_SIDES = 3n;

export function memoryMap(vm: Vm): MemoryMap {
  const slots = [...vm.memslots.values()].sort((a, b) => a.address - b.address);
  const longest = Math.max(...slots.map(({ size }) => size));
  let scale = vm.kvm.pageSize;
  while (longest / scale > LONGEST_BAR) scale *= 2;
  const bars = slots.map((slot) => {
    const cells: Cell[] = [];
    for (let at = 0; at < slot.size; at += scale) {
      cells.push(cell(vm, slot, { address: slot.address + at, size: Math.min(scale, slot.size - at) }));
    }
    return { address: slot.address, size: slot.size, cells };
  });
  return { scale, bars };
}

function cell(vm: Vm, slot: Memslot, range: GuestRange): Cell {
  const cell: Cell = { size: { private: 0, shared: 0 }, held: { private: 0, shared: 0 }, stray: 0 };
  const add = (address: number, end: number, seen: Visibility): void => {
    if (address === end) return;
    const held = heldBytes(slot, address - slot.address, end - address);
    cell.size[seen] += end - address;
    cell.held[seen] += held[seen];
    cell.stray += held[seen === 'private' ? 'shared' : 'private'];
  };
  let at = range.address;
  for (const { address, size } of vm.attributes.privateRanges(range)) {
    add(at, address, 'shared');
    add(address, address + size, 'private');
    at = address + size;
  }
  add(at, range.address + range.size, 'shared');
  return cell;
}

function heldBytes(slot: Memslot, offset: number, size: number): Record<Visibility, number> {
  const { guestMemfd: file, guestMemfdOffset, hostMemory, hostOffset } = slot;
  const inFile = file?.residentBytes({ offset: guestMemfdOffset + offset, size }) ?? 0;
  const inHost = hostMemory?.residentBytes({ offset: hostOffset + offset, size }) ?? 0;
  return file && isForBoth(file) ? { shared: inFile, private: 0 } : { shared: inHost, private: inFile };
}

function isForBoth({ flags }: GuestMemfd): boolean {
  return (flags & BOTH_SIDES) === BOTH_SIDES;
}

// ── Drawing

type Level = 'empty' | 'part' | 'all';
const glyphs: Readonly<Record<Visibility, Readonly<Record<Level, string>>>> = {
  shared: { empty: '·', part: '▄', all: '█' },
  private: { empty: '░', part: '▒', all: '▓' },
};
const STRAY = '!';
export const sideColours = { shared: 'green', private: 'magenta' } as const;

/** One line for each memslot, from its first address to its end. */
export function drawMap({ bars }: MemoryMap, paint: Paint): string[] {
  return bars.map(({ address, size, cells }) => {
    const bar = cells.map((one) => drawCell(one, paint)).join('');
    return `${place(address).padStart(LABEL)} ${paint('dim', '│')}${bar}${paint('dim', '│')} ${place(address + size)}`;
  });
}

/** What the characters mean, those for strays only where there are any. */
export function drawLegend({ scale, bars }: MemoryMap, paint: Paint): string[] {
  const side = (name: Visibility): string =>
    `${paint(sideColours[name], glyphs[name].empty)} nothing held  ${paint(sideColours[name], glyphs[name].part)} part held  ${paint(sideColours[name], glyphs[name].all)} all held`;
  const indent = ' '.repeat(LABEL + 2);
  const lines = [
    `${indent}shared with the host:  ${side('shared')}`,
    `${indent}private to the guest:  ${side('private')}`,
    `${indent}one character is ${place(scale)}`,
  ];
  if (bars.some(({ cells }) => cells.some(({ stray }) => stray > 0)))
    lines.push(`${indent}${paint('red', STRAY)} held on the side the guest does not see`);
  return lines;
}

function drawCell({ size, held, stray }: Cell, paint: Paint): string {
  if (stray > 0) return paint('red', STRAY);
  const alone = held.private > 0 !== held.shared > 0;
  const secret = alone ? held.private > 0 : size.private >= size.shared;
  const side = secret ? 'private' : 'shared';
  const level = held[side] === 0 ? 'empty' : held[side] < size[side] ? 'part' : 'all';
  return paint(sideColours[side], glyphs[side][level]);
}
