import { KVM_MEM_GUEST_MEMFD } from '../../uapi.ts';
import { i32, isZero } from '../arguments.ts';
import type { Result } from '../kernel.ts';
import type { OpenFile, RegionRequest, VmFile } from '../state.ts';
import { ConversionCalls } from './conversion_calls.ts';
import { MemoryFile } from './memory_file.ts';
import { SoftwareGuestMemfd } from './software_files.ts';

/** Bytes of a file that are about to go. */
export type Invalidation = (range: { readonly offset: number; readonly size: number }) => void;

/** A memfd that is sealed for a guest in the place of a guest_memfd, and the word to its VM when pages go. */
export abstract class GuestSealCalls extends ConversionCalls {
  /**
   * Tells of pages of a file that are about to go by a punch, a truncation or its last close, while they are still there: what the proposal
   * tells KVM, which takes them from the guest first. An error that the listener throws is reported as uncaught, and stops nothing.
   *
   * @param fd A guest_memfd or a memfd.
   * @returns the function that ends it, or -errno: EBADF, EOPNOTSUPP without the proposal, ENODEV for a file of another kind.
   */
  onInvalidate(fd: number, listener: Invalidation): (() => void) | Result {
    if (typeof listener !== 'function') throw new TypeError('listener must be a function');
    const file = this.file(i32('fd', fd));
    if (!file) return this.badFd(fd);
    if (!this.machine.proposals.has('guest-seal'))
      return this.refuse('EOPNOTSUPP', "this kernel tells nobody: it is a part of the proposal 'guest-seal'");
    if (!(file instanceof SoftwareGuestMemfd || file instanceof MemoryFile))
      return this.refuse('ENODEV', 'this file has no pages');
    const { store } = file;
    const watcher = (startPage: number, endPage: number): void => {
      const end = Math.min(endPage, file.pages);
      if (startPage >= end) return;
      try {
        listener({ offset: startPage * this.pageSize, size: (end - startPage) * this.pageSize });
      } catch (error) {
        queueMicrotask(() => {
          throw error;
        });
      }
    };
    store.watchers.add(watcher);
    return () => {
      store.watchers.delete(watcher);
    };
  }

  /** A file as a memslot takes it: one that is sealed for a guest is the guest_memfd of the first VM that binds it. */
  protected asGuestFile(file: OpenFile | undefined, vm: VmFile): OpenFile | undefined {
    if (!(file instanceof MemoryFile) || !file.isForGuest) return file;
    return file.guest ?? new SoftwareGuestMemfd(vm, file.size, 0, file.ino, null, file.store);
  }

  /** After a memslot was made: the file is that VM's from now on, and its slots hold it no longer than it is open. */
  protected keepGuestFile(file: OpenFile | undefined, { flags, memorySize, file: bound }: RegionRequest): void {
    const binds = (flags & KVM_MEM_GUEST_MEMFD) !== 0 && !isZero(memorySize);
    if (binds && file instanceof MemoryFile && bound instanceof SoftwareGuestMemfd) file.guest ??= bound.hold();
  }
}
