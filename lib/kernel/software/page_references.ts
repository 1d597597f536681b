import { RangeMap } from '../../ranges.ts';
import type { Obstacle } from '../state.ts';

/** Where pages lie that may not stay where they are. */
export type MovableZone = 'movable' | 'cma';

/** A set of pages of the file. */
type Pages = RangeMap<true>;

/** Who holds pages of a guest_memfd besides the guest: what a kernel sees as references that it did not expect. Units: pages of the file. */
export class PageReferences {
  /** By mapping, what its page tables have. */
  readonly #mapped = new Set<Pages>();
  readonly #pins = new Set<Pages>();
  readonly #zones = new RangeMap<MovableZone>();

  /** Page tables of a new mapping of the file. */
  addMapping(): Pages {
    const pages: Pages = new RangeMap();
    this.#mapped.add(pages);
    return pages;
  }

  removeMapping(pages: Pages): void {
    this.#mapped.delete(pages);
  }

  /** Takes pages out of the page tables of every mapping. */
  unmap(start: number, end: number): void {
    for (const pages of this.#mapped) pages.delete(start, end);
  }

  /** @returns the function that lets go. */
  pin(start: number, end: number): () => void {
    const pages: Pages = new RangeMap();
    pages.set(start, end, true);
    this.#pins.add(pages);
    return () => {
      this.#pins.delete(pages);
    };
  }

  firstPinned(start: number, end: number): number | undefined {
    return firstOf(this.#pins, start, end);
  }

  *pinned(): Generator<{ readonly start: number; readonly end: number }> {
    for (const pages of this.#pins) yield* pages;
  }

  setZone(start: number, end: number, zone: MovableZone | null): void {
    if (zone) this.#zones.set(start, end, zone);
    else this.#zones.delete(start, end);
  }

  /** Pages go: page tables drop them, and what comes in their place lies elsewhere. Whoever pinned one keeps the old page. */
  forget(start: number, end: number): void {
    this.unmap(start, end);
    for (const pages of this.#pins) pages.delete(start, end);
    this.#zones.delete(start, end);
  }

  /** The first page that is held, or that may not stay. @param windowed The pages that live views of JavaScript reach. */
  first(start: number, end: number, windowed: number | undefined): Obstacle | null {
    const [zone] = this.#zones.within(start, end);
    const place = zone?.value === 'cma' ? 'a CMA area' : 'a movable zone';
    const candidates: readonly (readonly [number | undefined, Obstacle['kind'], string])[] = [
      [zone?.start, 'movable', `lies in ${place}, where nothing may stay`],
      [this.firstPinned(start, end), 'reference', 'is pinned'],
      [firstOf(this.#mapped, start, end), 'reference', 'is mapped by the host'],
      [windowed, 'reference', 'is in a window of the host'],
    ];
    let found: Obstacle | null = null;
    for (const [page, kind, sentence] of candidates) {
      if (page !== undefined && page < (found?.page ?? end)) found = { page, kind, sentence };
    }
    return found;
  }
}

function firstOf(sets: Iterable<Pages>, start: number, end: number): number | undefined {
  let first: number | undefined;
  for (const pages of sets) {
    for (const range of pages.within(start, first ?? end)) {
      first = range.start;
      break;
    }
  }
  return first;
}
