import { randomBytes } from 'node:crypto';
import { basename, join, resolve } from 'node:path';
import { KvmError } from '../errors.ts';
import { formatBytes, formatRange } from '../format.ts';
import type { GuestMemfd } from '../guest_memfd.ts';
import { HostMemory } from '../host_memory.ts';
import type { Kernel } from '../kernel/kernel.ts';
import type { Kvm } from '../kvm.ts';
import type { MemoryUser } from '../memory_user.ts';
import { guardConstructor, internal, Resource } from '../resource.ts';
import { boolean, integer, options, rangeError, text } from '../validate.ts';
import type { Vcpu } from '../vcpu.ts';
import type { Vm } from '../vm.ts';
import { capture, vcpusOf } from './capture.ts';
import { copyIn, copyOut, type Source } from './copy.ts';
import { corrupt, Disk, type FileSystem } from './disk.ts';
import type { Metadata, StoredRegion } from './metadata.ts';
import { MetadataFile } from './metadata_file.ts';
import { type AttachOptions, assertFits, listenersOf, type Rebuilt, rebuild } from './rebuild.ts';
import { DATA, type MemoryOwner, StoredMemory, tagsOf } from './stored_memory.ts';
import { WriterLock } from './writer_lock.ts';

export interface StoreOptions {
  /** Looks on, and restores snapshots, besides the one that writes. Default false. */
  readonly readOnly?: boolean;
  /**
   * A folder, usually of another file system, for the bytes of what create() makes, so that only metadata and snapshots are at the store's own path:
   * hugetlbfs, which keeps nothing else, or a DAX file system.
   */
  readonly data?: string;
}

export interface StoredMemoryOptions {
  /** Bytes, page-aligned; with `data` on hugetlbfs, of its huge pages. Space is taken page by page as it is written. */
  readonly size: number;
  /** The user's own words about it. */
  readonly tags?: Readonly<Record<string, string>>;
}

export interface SnapshotOptions {
  /** vCPUs whose state is kept as well; none may be running. */
  readonly vcpus?: readonly Vcpu[];
  readonly tags?: Readonly<Record<string, string>>;
}

/** What attach() and restore() made; the VM has its memslots and attributes. */
export interface StoredVm {
  /** The memory the VM shows; null after restore(), which made copies. */
  readonly memory: StoredMemory | null;
  /** The device ledger: the devices, and what they held. */
  readonly users: readonly MemoryUser[];
  /** Created, with the state that was kept. */
  readonly vcpus: readonly Vcpu[];
  /** Private guest memory, which nobody but the VM that is gone could read: it is private again, and zeros. */
  readonly lost: readonly { readonly address: number; readonly size: number }[];
}

/** Where bytes go that are not beside their metadata. */
interface DataFolder {
  readonly path: string;
  /** Bytes; null unless it is on hugetlbfs. */
  readonly hugePageSize: number | null;
}

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;
const DRAFT = /^\.(?:new|gone|lock)-/;
const SIZE_MAX = 2 ** 52;
/** What a data file is called in a folder of its own: nothing else is ever removed there. */
const ELSEWHERE = /^guest-memory-[0-9a-f]{12}$/;

/**
 * A place for guest memory that outlives its process: a folder, in which every memory has a name. Its bytes are one file, which guests see
 * directly; two copies of its metadata, of which an update overwrites the older one, say how a VM showed it. Whatever process ends whenever, the next one
 * finds every byte, and the metadata as of before or after the update that was at work. See docs/store.md.
 */
export class GuestMemoryStore extends Resource {
  readonly path: string;
  readonly readOnly: boolean;
  readonly #kvm: Kvm;
  readonly #disk: Disk;
  readonly #data: DataFolder | null;
  readonly #owner: MemoryOwner;
  readonly #open = new Map<string, StoredMemory>();

  /** @internal */
  static open(
    token: typeof internal,
    kvm: Kvm,
    kernel: Kernel,
    path: string,
    given: StoreOptions,
    assertOpen: () => void,
    files?: FileSystem,
  ): GuestMemoryStore {
    const folder = text('path', path);
    const { readOnly = false, data } = options('options', given);
    boolean('readOnly', readOnly);
    if (data !== undefined) text('data', data);
    assertOpen();
    const disk = new Disk(files);
    const elsewhere = data === undefined ? null : dataFolder(disk, resolve(data));
    return disk.on(folder, () => {
      if (readOnly) {
        disk.fs.readdirSync(folder);
        return new GuestMemoryStore(token, kvm, kernel, disk, folder, null, elsewhere);
      }
      disk.fs.mkdirSync(folder, { recursive: true, mode: 0o700 });
      if (disk.hugePageSizeOf(folder))
        throw new KvmError({
          code: 'EINVAL',
          message: `${folder} is on hugetlbfs, which keeps only guest memory: open the store elsewhere, with { data: ${JSON.stringify(folder)} }`,
        });
      const lock = WriterLock.take(disk, folder);
      try {
        for (const name of disk.fs.readdirSync(folder)) if (DRAFT.test(name)) discard(disk, join(folder, name));
      } catch (error) {
        WriterLock.release(lock.path);
        throw error;
      }
      return new GuestMemoryStore(token, kvm, kernel, disk, folder, lock, elsewhere);
    });
  }

  /** @internal */
  constructor(
    token: typeof internal,
    kvm: Kvm,
    kernel: Kernel,
    disk: Disk,
    path: string,
    lock: WriterLock | null,
    data: DataFolder | null,
  ) {
    guardConstructor(token, 'kvm.openStore()');
    super(kvm, `the store ${path}`, releasing(lock));
    this.path = path;
    this.readOnly = lock === null;
    this.#kvm = kvm;
    this.#disk = disk;
    this.#data = data;
    this.#owner = {
      kvm,
      kernel,
      readOnly: lock === null,
      assertOpen: () => this.assertOpen(),
      assertWriter: () => this.#assertWriter(),
    };
    Object.freeze(this);
  }

  /** The names of what is stored, in order. */
  list(): string[] {
    this.assertOpen();
    const names = this.#disk.on(this.path, () => this.#disk.fs.readdirSync(this.path));
    return names.filter((name) => NAME.test(name) && !name.startsWith('writer.')).sort();
  }

  /**
   * Makes memory of zeros. It is there with all it needs or not at all, whenever the process ends.
   *
   * @throws KvmError `EEXIST` the name is taken · `EFBIG` the file system has no files of that size · `ENOSPC`, `EACCES` and others of the system calls
   *   behind it · `EROFS` the store was opened with readOnly · `ERR_CLOSED` · TypeError, RangeError for arguments that cannot be
   */
  create(name: string, given: StoredMemoryOptions): StoredMemory {
    const checked = nameOf(name);
    const { size, tags = {} } = options('options', given);
    const { pageSize, arch } = this.#kvm;
    const unit = this.#data?.hugePageSize ?? pageSize;
    if (integer('size', size, 1, SIZE_MAX) % unit)
      throw rangeError(`size must be a multiple of ${formatBytes(unit)}, got ${size}`);
    const metadata: Metadata = {
      ...{ size, arch, pageSize, vmType: 'default', isSnapshot: false, tags: tagsOf(tags) },
      ...{ regions: [], slots: [], users: [], vcpus: [], privatePages: new Uint8Array(0) },
    };
    this.assertOpen();
    this.#build(checked, metadata, this.#data?.path);
    return this.open(checked);
  }

  /**
   * The memory of a name; the same object while it is open.
   *
   * @throws KvmError `ENOENT` there is none · `ERR_CORRUPT` neither copy of its metadata is whole, or bytes are missing · `ERR_CLOSED`
   */
  open(name: string): StoredMemory {
    const checked = nameOf(name);
    this.assertOpen();
    const known = this.#open.get(checked);
    if (known && !known.closed && !this.readOnly) return known;
    const folder = join(this.path, checked);
    const file = new MetadataFile(this.#disk, folder);
    const metadata = this.#disk.on(folder, () => {
      this.#disk.fs.readdirSync(folder);
      const found = file.read();
      const fd = this.#openData(folder);
      try {
        const { size } = this.#disk.fs.fstatSync(fd);
        if (size < found.size)
          throw corrupt(`${join(folder, DATA)} has ${size} bytes, and ${found.size} were stored: somebody has cut it`);
      } finally {
        this.#disk.fs.closeSync(fd);
      }
      return found;
    });
    if (known && !known.closed) return known.renewed(metadata);
    const open = this.#open;
    const memory = new StoredMemory(internal, this, this.#owner, { name: checked, folder, file }, metadata, () =>
      open.delete(checked),
    );
    open.set(checked, memory);
    return memory;
  }

  /**
   * Forgets memory, bytes and all.
   *
   * @throws KvmError `ENOENT` there is none · `EBUSY` it is open · `EROFS` the store was opened with readOnly · `ERR_CLOSED`
   */
  remove(name: string): void {
    const checked = nameOf(name);
    this.assertOpen();
    this.#assertWriter();
    const known = this.#open.get(checked);
    if (known && !known.closed)
      throw new KvmError({ code: 'EBUSY', message: `the stored memory '${checked}' is open: close it first` });
    const path = join(this.path, checked);
    this.#disk.on(path, () => {
      // By another name first: half of it must never be found.
      const gone = this.#draft('gone');
      this.#disk.fs.renameSync(path, gone);
      discard(this.#disk, gone);
    });
  }

  /**
   * Shows stored memory to a new VM as it was shown when it was recorded: memslots, attributes, the device ledger, vCPUs. Nothing is copied.
   *
   * @throws KvmError `EINVAL` the VM is of another type or architecture · `EEXIST` it has memslots · `EROFS` a snapshot, or the store was opened with
   *   readOnly · `ENOENT`, `ERR_CORRUPT` as open() · what making each of them throws; the VM is as before then · `ERR_CLOSED`
   */
  attach(vm: Vm, name: string, given: AttachOptions = {}): StoredVm {
    const listeners = listenersOf(given);
    const memory = this.open(name);
    const { metadata } = memory.backing;
    assertFits(vm, metadata);
    const { isMapped } = memory.backing;
    const { hostMemory } = memory;
    const host = ({ dataOffset }: StoredRegion) => ({ memory: hostMemory, offset: dataOffset ?? 0 });
    try {
      return { memory, ...rebuild(vm, metadata, host, () => {}, listeners) };
    } catch (error) {
      if (!isMapped) hostMemory.close();
      throw error;
    }
  }

  /**
   * Keeps a copy of a VM: all of its memory, its memslots, attributes and device ledger, and the state of vCPUs. Nothing may change meanwhile: stop
   * the vCPUs, and call it in one go with that. Pages of zeros take no space.
   *
   * @throws KvmError `UNSUPPORTED` the guest has private contents, naming the ranges: nobody else can read them · `EBUSY` a vCPU runs · `EEXIST` the name
   *   is taken · `ENOSPC` and others of the system calls behind it; nothing of it is there then · `ERR_CLOSED`
   */
  snapshot(vm: Vm, name: string, given: SnapshotOptions = {}): StoredMemory {
    const checked = nameOf(name);
    const { vcpus: chosen, tags = {} } = options('options', given);
    const vcpus = vcpusOf(vm, chosen);
    const words = tagsOf(tags);
    this.assertOpen();
    this.#assertWriter();
    vm.backing.assertOpen();
    assertReadable(vm);
    const sources = sourcesOf(vm);
    const layout = capture(vm, new Map(sources.map(({ memory, at }) => [memory, at])), vcpus);
    const size = sources.reduce((sum, { memory }) => sum + memory.size, 0);
    this.#build(checked, { ...layout, size, isSnapshot: true, tags: words }, undefined, (fd) => {
      for (const source of sources) copyOut(this.#disk, vm.backing.kernel, source, fd);
    });
    return this.open(checked);
  }

  /**
   * Gives a new VM a copy of a snapshot, or of other stored memory: as attach(), with anonymous host memory and guest_memfds of its own. What is
   * stored stays as it is, and a store opened with readOnly will do.
   *
   * @throws KvmError as attach() · `ENOMEM`
   */
  restore(vm: Vm, name: string, given: AttachOptions = {}): StoredVm {
    const listeners = listenersOf(given);
    const { metadata, path } = this.open(name).backing;
    assertFits(vm, metadata);
    const made: HostMemory[] = [];
    const kernel = vm.backing.kernel;
    try {
      const rebuilt: Rebuilt = rebuild(
        vm,
        metadata,
        ({ size, dataOffset }) => {
          const memory = vm.kvm.createHostMemory({ size });
          made.push(memory);
          copyIn(this.#disk, kernel, path, { offset: dataOffset ?? 0, size }, memory.backing.mapping);
          return { memory, offset: 0 };
        },
        ({ size, dataOffset }, file) =>
          copyIn(this.#disk, kernel, path, { offset: dataOffset ?? 0, size }, file.backing.map()),
        listeners,
      );
      return { memory: null, ...rebuilt };
    } catch (error) {
      for (const memory of made) memory.close();
      throw error;
    }
  }

  /**
   * Unmaps what is open, and lets the next one write. `Symbol.dispose` does the same, and removes the memslots that show it first.
   *
   * @throws KvmError `EBUSY` while a memslot shows memory of it
   */
  override close(): void {
    if (this.closed) return;
    // First all that can refuse.
    for (const memory of [...this.#open.values()]) memory.close();
    super.close();
  }

  override [Symbol.dispose](): void {
    for (const memory of [...this.#open.values()]) memory[Symbol.dispose]();
    super.close();
  }

  #assertWriter(): void {
    if (this.readOnly)
      throw new KvmError({ code: 'EROFS', message: `the store ${this.path} was opened with { readOnly: true }` });
  }

  /** A folder that appears under its name when all of it is there. */
  #build(name: string, metadata: Metadata, elsewhere?: string, fill: (fd: number) => void = () => {}): void {
    this.#assertWriter();
    const path = join(this.path, name);
    this.#disk.on(path, () => {
      const { fs } = this.#disk;
      if (fs.readdirSync(this.path).includes(name)) throw taken(path);
      const draft = this.#draft('new');
      try {
        fs.mkdirSync(draft, { mode: 0o700 });
        const beside = join(draft, DATA);
        const data =
          elsewhere === undefined ? beside : join(elsewhere, `guest-memory-${randomBytes(6).toString('hex')}`);
        // The name first: whoever finds the draft knows what to remove.
        if (data !== beside) fs.symlinkSync(data, beside);
        const fd = fs.openSync(data, 'wx', 0o600);
        try {
          fs.ftruncateSync(fd, metadata.size);
          fill(fd);
          fs.fsyncSync(fd);
        } finally {
          fs.closeSync(fd);
        }
        new MetadataFile(this.#disk, draft).write(metadata);
        this.#disk.syncFolder(draft);
        fs.renameSync(draft, path);
      } catch (error) {
        discard(this.#disk, draft);
        throw error;
      }
      this.#disk.syncFolder(this.path);
    });
  }

  #openData(folder: string): number {
    try {
      return this.#disk.fs.openSync(join(folder, DATA), 'r');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      throw corrupt(
        `the bytes of ${folder} are gone: ${elsewhereOf(this.#disk.fs, folder) ?? join(folder, DATA)} does not exist`,
      );
    }
  }

  #draft(kind: 'new' | 'gone'): string {
    return join(this.path, `.${kind}-${randomBytes(6).toString('hex')}`);
  }
}

/** Removes a memory's folder, or a lock's draft, and the bytes it has elsewhere. */
function discard({ fs }: Disk, path: string): void {
  const data = elsewhereOf(fs, path);
  if (data !== null) fs.rmSync(data, { force: true });
  fs.rmSync(path, { recursive: true, force: true });
}

function elsewhereOf(fs: FileSystem, path: string): string | null {
  try {
    const data = fs.readlinkSync(join(path, DATA));
    return ELSEWHERE.test(basename(data)) ? data : null;
  } catch (error) {
    // There is none, it is no link, or this is no folder.
    if (['ENOENT', 'EINVAL', 'ENOTDIR'].includes((error as NodeJS.ErrnoException).code ?? '')) return null;
    throw error;
  }
}

/** @throws KvmError `ENOENT` and others of the system calls behind it */
function dataFolder(disk: Disk, path: string): DataFolder {
  const hugePageSize = disk.on(path, () => {
    disk.fs.readdirSync(path);
    return disk.hugePageSizeOf(path);
  });
  return { path, hugePageSize };
}

function taken(path: string): KvmError {
  return new KvmError({ code: 'EEXIST', message: `${path} exists already: remove it first, or take another name` });
}

function nameOf(name: string): string {
  const checked = text('name', name);
  if (!NAME.test(checked) || checked.startsWith('writer.'))
    throw rangeError(
      `name must be 1 to 100 letters, digits, '.', '_' and '-', with a letter or digit first, and no 'writer.', got ${JSON.stringify(checked.slice(0, 40))}`,
    );
  return checked;
}

function releasing(lock: WriterLock | null): () => void {
  return () => {
    if (lock) WriterLock.release(lock.path);
  };
}

/** @throws KvmError `UNSUPPORTED` */
function assertReadable(vm: Vm): void {
  if (vm.type === 'protected')
    throw KvmError.unsupported(
      "a snapshot needs to read all of the guest's memory, which a protected guest has for itself",
    );
  const secret = [...vm.memslots.values()].flatMap((slot) => {
    const { guestMemfd } = slot;
    if (!guestMemfd) return [];
    if (guestMemfd.backing.gmemOnly && !guestMemfd.backing.hostAccessible) return [slot];
    return slot.slot < 0x10000 ? vm.attributes.privateRanges(slot) : [];
  });
  if (secret.length === 0) return;
  const named = secret.slice(0, 8).map(({ address, size }) => formatRange(address, size));
  const more = secret.length > named.length ? ` and ${secret.length - named.length} more` : '';
  throw KvmError.unsupported(
    `a snapshot needs to read all of the guest's memory, and these ranges are private: ${named.join(', ')}${more}; have the guest share them first`,
  );
}

function sourcesOf(vm: Vm): Source[] {
  const memories = new Set<HostMemory | GuestMemfd>();
  for (const { hostMemory, guestMemfd } of vm.memslots.values()) {
    if (hostMemory) memories.add(hostMemory);
    if (guestMemfd?.backing.hostAccessible) memories.add(guestMemfd);
  }
  let at = 0;
  return Array.from(memories, (memory) => {
    const source = HostMemory.is(memory)
      ? { memory, at, mapping: memory.backing.mapping, fd: memory.backing.fd }
      : { memory, at, mapping: memory.backing.map(), fd: -1 };
    at += memory.size;
    return source;
  });
}
