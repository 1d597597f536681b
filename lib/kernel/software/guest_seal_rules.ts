import { hex } from '../../format.ts';
import { FALLOC_FL_PUNCH_HOLE } from '../../uapi.ts';
import { big, isAligned, sumExceeds } from '../arguments.ts';
import type { FallocateRequest } from '../rules/guest_memfd.ts';
import { type Rule, rule } from '../rules/rule.ts';
import { type MemoryFile, SEAL_SEAL } from './memory_file.ts';

/** F_ADD_SEALS with F_SEAL_GUEST: nobody may have seen a byte of the file, or be able to see one later. */
export const guestSealRules: readonly Rule<MemoryFile, number>[] = [
  rule('EPERM', 'sealed', ({ seals }) => (seals & SEAL_SEAL) !== 0 && 'the file takes no more seals'),
  rule('EINVAL', 'guest-seal-size', ({ size, store }) => {
    return (
      (size === 0 || size % store.pageSize !== 0) &&
      `the file has ${size} bytes: a guest's has whole pages of ${store.pageSize}, and keeps its size`
    );
  }),
  rule('EBUSY', 'guest-seal-mapped', ({ mappings }) => mappings > 0 && 'the file is mapped'),
  rule('EBUSY', 'guest-seal-pages', ({ pages, store }) => {
    const count = store.residentPages(0, pages);
    return count > 0 && `the file has ${count} pages already: punch them out first`;
  }),
];

/** What can no longer be done to a file that is sealed for a guest: the request is the word for it. */
export const guestFileRules: readonly Rule<MemoryFile, string>[] = [
  rule(
    'EPERM',
    'guest-sealed',
    (file, what) => file.isForGuest && `the file is sealed for a guest and cannot be ${what}`,
  ),
];

/** fallocate(2) on a file that is sealed for a guest: whole pages of the size it has. */
export const guestFileFallocateRules: readonly Rule<MemoryFile, FallocateRequest>[] = [
  rule('EINVAL', 'guest-sealed-alignment', ({ isForGuest, store }, { offset, length }) => {
    const aligned = isAligned(offset, store.pageSize) && isAligned(length, store.pageSize);
    return (
      isForGuest &&
      !aligned &&
      `range ${hex(offset)}, +${hex(length)} is not made of whole pages of ${store.pageSize} bytes`
    );
  }),
  rule('EPERM', 'guest-sealed-size', ({ isForGuest, size }, { mode, offset, length }) => {
    const grows = !(mode & FALLOC_FL_PUNCH_HOLE) && sumExceeds(offset, length, size);
    return isForGuest && grows && `the file is sealed for a guest and ends at ${big(size)}`;
  }),
];
