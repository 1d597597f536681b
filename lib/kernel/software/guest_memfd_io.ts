import { formatBytes, hex } from '../../format.ts';
import { ERRNO, SEEK_CUR, SEEK_END, SEEK_SET } from '../../uapi.ts';
import type { Result } from '../kernel.ts';
import { type Rule, rule } from '../rules/rule.ts';
import type { SoftwareGuestMemfd } from './software_files.ts';

/** Bytes of the file. */
export interface TransferRequest {
  readonly offset: number;
  readonly length: number;
  readonly write: boolean;
}

/** A private page that a request begins in. */
function privatePage(file: SoftwareGuestMemfd, { offset, length }: TransferRequest): number | null {
  const page = Math.floor(offset / file.store.pageSize);
  return length > 0 && file.privatePages.get(page) ? page : null;
}

const where = (file: SoftwareGuestMemfd, page: number): string =>
  `the page at offset ${hex(page * file.store.pageSize)}`;

/** read(2), write(2), pread(2) and pwrite(2) on a guest_memfd that was created for them. What a request begins with decides. */
export const transferRules: readonly Rule<SoftwareGuestMemfd, TransferRequest>[] = [
  rule('EINVAL', 'gmem-write-end', (file, { offset, length, write }) => {
    return (
      write &&
      offset + length > Number(file.size) &&
      `the range ends past the end of the file, ${formatBytes(file.size)}`
    );
  }),
  rule('EFAULT', 'gmem-transfer-private', (file, request) => {
    const page = privatePage(file, request);
    const known = page !== null && (!request.write || file.store.firstTouched(page, page + 1) !== undefined);
    return known && `${where(file, page)} is private`;
  }),
  rule('EINVAL', 'gmem-populate-alignment', (file, request) => {
    const page = privatePage(file, request);
    const { pageSize } = file.store;
    const whole = request.offset % pageSize === 0 && request.length >= pageSize;
    return page !== null && !whole && `${where(file, page)} is private: it is populated as a whole or not at all`;
  }),
];

/** The bytes of a guest_memfd as a file: shared ones at any alignment, private ones by whole pages, before anybody has touched them. */
export class GuestMemfdIo {
  position = 0;
  readonly #file: SoftwareGuestMemfd;

  constructor(file: SoftwareGuestMemfd) {
    this.#file = file;
  }

  read(target: Uint8Array, offset: number): Result {
    const length = Math.max(0, Math.min(target.length, Number(this.#file.size) - offset));
    const count = this.#reach({ offset, length, write: false });
    this.#file.store.read(offset, target.subarray(0, count));
    return count;
  }

  write(source: Uint8Array, offset: number): Result {
    const count = this.#reach({ offset, length: source.length, write: true });
    this.#file.store.write(offset, source.subarray(0, count));
    return count;
  }

  seek(offset: number, whence: number): Result {
    const from = new Map([
      [SEEK_SET, 0],
      [SEEK_CUR, this.position],
      [SEEK_END, Number(this.#file.size)],
    ]).get(whence);
    if (from === undefined || from + offset < 0) return -ERRNO.EINVAL;
    this.position = from + offset;
    return this.position;
  }

  /** How many bytes the request may go on for. */
  #reach({ offset, length, write }: TransferRequest): number {
    const { privatePages, store } = this.#file;
    const { pageSize } = store;
    const end = offset + length;
    const last = Math.ceil(end / pageSize);
    for (const secret of privatePages.within(Math.floor(offset / pageSize), last)) {
      if (!write) return Math.max(0, secret.start * pageSize - offset);
      const known = store.firstTouched(secret.start, secret.end);
      if (known !== undefined) return Math.max(0, known * pageSize - offset);
      if (end < secret.end * pageSize) return Math.max(0, Math.floor(end / pageSize) * pageSize - offset);
    }
    return length;
  }
}
