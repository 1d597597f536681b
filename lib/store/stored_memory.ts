import { join } from 'node:path';
import { KvmError, systemError } from '../errors.ts';
import type { FileRange, GuestRange } from '../guest_range.ts';
import { HostMemory } from '../host_memory.ts';
import { dataExtents } from '../kernel/data_extents.ts';
import type { Kernel } from '../kernel/kernel.ts';
import type { Kvm } from '../kvm.ts';
import { guardConstructor, internal, Resource } from '../resource.ts';
import { MS_SYNC, O_CLOEXEC, O_RDONLY } from '../uapi.ts';
import { options, text } from '../validate.ts';
import type { Vcpu } from '../vcpu.ts';
import type { Vm } from '../vm.ts';
import type { VmType } from '../vm_type.ts';
import { capture, vcpusOf } from './capture.ts';
import { fileReason } from './disk.ts';
import { type Metadata, pageRanges } from './metadata.ts';
import type { MetadataFile } from './metadata_file.ts';

export const DATA = 'data';

export interface RecordOptions {
  /** vCPUs whose state is kept as well; none may be running. */
  readonly vcpus?: readonly Vcpu[];
}

/** What the store knows of a memory, as plain data. */
export interface MemoryDescription {
  readonly vmType: VmType;
  /** Made by snapshot(): for restore(), not for attach(). */
  readonly isSnapshot: boolean;
  readonly memslots: readonly {
    readonly slot: number;
    readonly address: number;
    readonly size: number;
    readonly backing: string;
  }[];
  readonly privateRanges: readonly GuestRange[];
  /** The device ledger: who held what. */
  readonly users: readonly { readonly name: string; readonly holds: readonly GuestRange[] }[];
  readonly vcpus: readonly number[];
}

/** What a memory needs of its store. */
export interface MemoryOwner {
  readonly kvm: Kvm;
  readonly kernel: Kernel;
  readonly readOnly: boolean;
  assertOpen(): void;
  assertWriter(): void;
}

/**
 * Guest memory with a name: bytes in a file that guests see directly, and what is needed to show them to a guest again. Whatever ends this
 * process, the bytes stay, and of the rest what was recorded last.
 */
export class StoredMemory extends Resource {
  readonly name: string;
  /** Bytes. */
  readonly size: number;
  readonly #owner: MemoryOwner;
  readonly #folder: string;
  readonly #file: MetadataFile;
  readonly #state: { metadata: Metadata; hostMemory: HostMemory | null };

  /** @internal */
  constructor(
    token: typeof internal,
    store: Resource,
    owner: MemoryOwner,
    place: { readonly name: string; readonly folder: string; readonly file: MetadataFile },
    metadata: Metadata,
    released: () => void,
  ) {
    guardConstructor(token, 'store.create() or store.open()');
    super(store, `the stored memory '${place.name}'`, released);
    this.name = place.name;
    this.size = metadata.size;
    this.#owner = owner;
    this.#folder = place.folder;
    this.#file = place.file;
    this.#state = { metadata, hostMemory: null };
    Object.freeze(this);
  }

  /**
   * Its bytes, for memslots: what a guest writes there is in the file. Mapped at the first call.
   *
   * @throws KvmError `EROFS` the store was opened with readOnly, or the memory is a snapshot · `UNSUPPORTED` its bytes are on hugetlbfs, on the software kernel · what mapping a file throws · `ERR_CLOSED`
   * @see mmap(2) with MAP_SHARED
   */
  get hostMemory(): HostMemory {
    this.assertOpen();
    this.#owner.assertWriter();
    const state = this.#state;
    if (state.metadata.isSnapshot)
      throw new KvmError({
        code: 'EROFS',
        message: `'${this.name}' is a snapshot: store.restore() gives a copy of it`,
      });
    if (!state.hostMemory || state.hostMemory.closed) {
      const { kvm, kernel } = this.#owner;
      const given = { kind: 'file', size: this.size, path: join(this.#folder, DATA) } as const;
      state.hostMemory = HostMemory.create(internal, kvm, kernel, given, () => this.assertOpen());
    }
    return state.hostMemory;
  }

  /** The user's own words about it. */
  get tags(): ReadonlyMap<string, string> {
    return new Map(this.#state.metadata.tags);
  }

  /**
   * Replaces the tags.
   *
   * @throws KvmError `EROFS` the store was opened with readOnly · `ENOSPC` and others of the system calls behind it; the tags are as before then ·
   *   `ERR_CLOSED`
   */
  setTags(tags: Readonly<Record<string, string>>): void {
    const checked = tagsOf(tags);
    this.assertOpen();
    this.#write({ ...this.#state.metadata, tags: checked });
  }

  /**
   * Keeps what a VM has made of this memory: its memslots, what of it is private, the device ledger, and the state of vCPUs. To be called after
   * every change that has to survive; the bytes survive without.
   *
   * @throws KvmError `EINVAL` a memslot shows memory that is not in the store · `EROFS` the store was opened with readOnly, or a snapshot · `EBUSY` a vCPU
   *   runs · `ENOSPC` and others of the system calls behind it; what was recorded before is still there · `ERR_CLOSED`
   */
  record(vm: Vm, given: RecordOptions = {}): void {
    const vcpus = vcpusOf(vm, options('options', given).vcpus);
    this.assertOpen();
    // No VM shows what nobody has asked for yet.
    const { hostMemory } = this.#state;
    const data = new Map(hostMemory ? [[hostMemory, 0] as const] : []);
    this.#write({ ...capture(vm, data, vcpus), size: this.size, isSnapshot: false, tags: this.#state.metadata.tags });
  }

  /** What was recorded last. */
  describe(): MemoryDescription {
    this.assertOpen();
    const { vmType, isSnapshot, slots, regions, users, vcpus, privatePages, pageSize } = this.#state.metadata;
    return {
      vmType,
      isSnapshot,
      memslots: slots.map(({ slot, address, size, host, guestMemfd }) => {
        const sides = [host !== null && 'stored', guestMemfd !== null && `guest_memfd ${regions[guestMemfd]?.size}`];
        return { slot, address, size, backing: sides.filter(Boolean).join(' + ') };
      }),
      privateRanges: Array.from(pageRanges(privatePages), ({ start, end }) => ({
        address: start * pageSize,
        size: (end - start) * pageSize,
      })),
      users,
      vcpus: vcpus.map(({ id }) => id),
    };
  }

  /**
   * The parts of the file that hold something, in ascending order and as large as they are: what lies between them reads as zeros and takes no
   * space.
   *
   * @see lseek(2) with SEEK_DATA and SEEK_HOLE; a file system that cannot say has one extent
   */
  extents(): FileRange[] {
    this.assertOpen();
    const { kernel } = this.#owner;
    const path = join(this.#folder, DATA);
    const { hostMemory } = this.#state;
    const mapped = hostMemory?.closed === false;
    const fd = mapped ? hostMemory.backing.fd : kernel.open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) throw systemError(fd, { syscall: 'open', args: { path } }, kernel.explain());
    try {
      return Array.from(dataExtents(kernel, fd, 0, this.size), ({ start, end }) => ({
        offset: start,
        size: end - start,
      }));
    } finally {
      if (!mapped) kernel.close(fd);
    }
  }

  /**
   * Waits until the disk has what was written: then it survives not only this process but the host's loss of power. On the software kernel also the
   * moment when what was written through a view reaches the file.
   *
   * @throws KvmError `ENOSPC`, `EIO` · `ERR_CLOSED`
   * @see msync(2) with MS_SYNC
   */
  sync(): void {
    const { kernel } = this.#owner;
    const { mapping } = this.hostMemory.backing;
    const result = kernel.msync(mapping, 0, this.size, MS_SYNC);
    if (result < 0) throw systemError(result, { syscall: 'msync' }, kernel.explain() ?? fileReason(result));
  }

  /**
   * Unmaps its bytes; they stay in the store.
   *
   * @throws KvmError `EBUSY` while a memslot shows it
   */
  override close(): void {
    this.#state.hostMemory?.close();
    super.close();
  }

  override [Symbol.dispose](): void {
    this.#state.hostMemory?.[Symbol.dispose]();
    super.close();
  }

  protected override closeWithOwner(): void {
    this.close();
  }

  /** @internal */
  get backing() {
    this.assertOpen();
    return { metadata: this.#state.metadata, path: join(this.#folder, DATA), isMapped: this.#isMapped };
  }

  /** @internal Another process may have recorded something since. */
  renewed(metadata: Metadata): this {
    this.#state.metadata = metadata;
    return this;
  }

  get #isMapped(): boolean {
    return this.#state.hostMemory?.closed === false;
  }

  #write(metadata: Metadata): void {
    this.#owner.assertWriter();
    this.#file.write(metadata);
    this.#state.metadata = metadata;
  }

  protected override assertOpen(): void {
    super.assertOpen();
    this.#owner.assertOpen();
  }
}

export function tagsOf(given: Readonly<Record<string, string>>): ReadonlyMap<string, string> {
  return new Map(
    Object.entries(options('tags', given)).map(([key, value]) => [text('tags', key), text(`tags.${key}`, value)]),
  );
}
