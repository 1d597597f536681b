import { systemError } from '../errors.ts';
import type { FileRange } from '../guest_range.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { RangeMap } from '../ranges.ts';
import { ERRNO, PROT_NONE } from '../uapi.ts';

/** What of a mapping's pages has to come yet, and how it is put there. Units: bytes of the mapping. */
export class PageFiller {
  readonly #kernel: Kernel;
  readonly #uffd: number;
  readonly #mapping: number;
  readonly #left = new RangeMap<true>();
  /** Where the guest was last: what lies behind it is wanted next. */
  #cursor = 0;

  constructor(kernel: Kernel, uffd: number, mapping: number, missing: readonly FileRange[]) {
    this.#kernel = kernel;
    this.#uffd = uffd;
    this.#mapping = mapping;
    for (const { offset, size } of missing) this.#left.set(offset, offset + size, true);
  }

  get leftBytes(): number {
    let sum = 0;
    for (const { start, end } of this.#left) sum += end - start;
    return sum;
  }

  /** The pages at which accesses wait, as far as they have not come. */
  waiting(milliseconds: number): FileRange[] {
    const { pageSize } = this.#kernel;
    const addresses: bigint[] = [];
    const result = this.#kernel.uffdRead(this.#uffd, milliseconds, addresses);
    if (result < 0) throw systemError(result, { syscall: 'read' }, this.#kernel.explain());
    const base = this.#kernel.addressOf(this.#mapping);
    const pages = new Set(addresses.map((address) => Math.floor(Number(address - base) / pageSize)));
    return [...pages]
      .filter((page) => this.#left.get(page * pageSize))
      .map((page) => ({ offset: page * pageSize, size: pageSize }));
  }

  /** What to fetch before anybody asks for it. */
  next(most: number): FileRange | null {
    const end = Number.MAX_SAFE_INTEGER;
    for (const from of [this.#cursor, 0])
      for (const range of this.#left.within(from, end))
        return { offset: range.start, size: Math.min(most, range.end - range.start) };
    return null;
  }

  /** @param content null for zeros. */
  fill({ offset, size }: FileRange, content: Uint8Array | null): void {
    const [kernel, uffd, mapping] = [this.#kernel, this.#uffd, this.#mapping];
    for (let at = offset; at < offset + size; ) {
      const result = content
        ? kernel.uffdioCopy(uffd, mapping, at, content.subarray(at - offset, size), 0)
        : kernel.uffdioZeropage(uffd, mapping, at, offset + size - at, 0);
      // The memory map is changing, or the page is there: whoever made it knew better.
      if (result === -ERRNO.EAGAIN) continue;
      const done = result === -ERRNO.EEXIST ? kernel.pageSize : result;
      if (done < 0) throw systemError(done, { syscall: 'ioctl', request: 'UFFDIO_COPY' }, kernel.explain());
      this.#left.delete(at, at + done);
      at += done;
    }
    this.#cursor = offset + size;
  }

  /** What has not come can be touched by nobody from now on; who waits for it finds EFAULT. */
  fail(): void {
    for (const { start, end } of [...this.#left]) {
      this.#kernel.mprotect(this.#mapping, start, end - start, PROT_NONE);
      this.#kernel.uffdioUnregister(this.#uffd, this.#mapping, start, end - start);
    }
  }
}
