import { KvmError, systemError } from '../errors.ts';
import { formatBytes } from '../format.ts';
import { GuestMemfd } from '../guest_memfd.ts';
import type { GuestRange } from '../guest_range.ts';
import { HostMemory, type HostMemoryKind, hostMemoryKinds } from '../host_memory.ts';
import type { Kernel, Result } from '../kernel/kernel.ts';
import type { Kvm } from '../kvm.ts';
import type { Memslot } from '../memslot.ts';
import { internal } from '../resource.ts';
import { ERRNO, MAP_SHARED, MFD_CLOEXEC, PROT_READ, PROT_WRITE } from '../uapi.ts';
import { boolean, guestRange, integer, oneOf, options } from '../validate.ts';
import type { Vm } from '../vm.ts';
import { type VmType, vmTypeNames } from '../vm_type.ts';

const MAGIC = 'guest-memfd memory image';
const VERSION = 1;
/** More than any layout needs; what a hostile image could make us read. */
const IMAGE_MAX = 1 << 28;

interface SlotImage {
  readonly slot: number;
  readonly address: number;
  readonly size: number;
  /** Indices among the files, -1 for none. */
  readonly hostMemory: number;
  readonly hostOffset: number;
  readonly guestMemfd: number;
  readonly guestMemfdOffset: number;
  readonly readonly: boolean;
  readonly logDirtyPages: boolean;
}

type FileImage =
  | { readonly kind: HostMemoryKind; readonly size: number; readonly alignment: number }
  | { readonly kind: 'guest_memfd'; readonly size: number; readonly flags: number };

/** What a VM's memory is, without its bytes: no pointers, and files by their place in a list. */
export interface MemoryImage {
  readonly magic: string;
  readonly version: number;
  readonly arch: string;
  readonly pageSize: number;
  readonly type: VmType;
  readonly files: readonly FileImage[];
  readonly slots: readonly SlotImage[];
  readonly privateRanges: readonly GuestRange[];
}

/** A VM's memory as a list of fds: the first is a file that says what the others are. */
export class MemoryFds implements Disposable {
  readonly fds: readonly number[];
  /** Bytes of guest memory in the files. */
  readonly bytes: number;
  readonly #kernel: Kernel;
  readonly #image: string;
  readonly #files: readonly object[];

  /**
   * @param data The user's own, for who takes the memory.
   * @throws KvmError `UNSUPPORTED` memory that is no file, or a guest_memfd that another VM could not have
   */
  constructor(vm: Vm, data: Uint8Array) {
    const { kernel } = vm.backing;
    const { image, memories, files } = describeMemory(vm);
    for (const { slot, hostMemory, guestMemfd } of vm.memslots.values()) {
      if (hostMemory && hostMemory.backing.fd < 0)
        throw KvmError.unsupported(
          `memslot ${slot} shows ${hostMemory.kind} memory, which is no file: create it with { kind: 'memfd' }`,
        );
      if (guestMemfd && !hasLinks(kernel, vm)) throw noLinks(`memslot ${slot} is bound to a guest_memfd, which`);
      if (hostMemory?.backing.paging())
        throw KvmError.unsupported(`the memory of memslot ${slot} has a pager, and its pages cannot come elsewhere`);
    }
    this.#kernel = kernel;
    this.#image = JSON.stringify(image);
    this.#files = [...memories, ...files];
    this.bytes = image.files.reduce((sum, { size }) => sum + size, 0);
    const others = [...memories.map(({ backing }) => backing.fd), ...files.map(({ fd }) => fd)];
    this.fds = [writeImage(kernel, this.#image, data), ...others];
  }

  /** Whether the memory is laid out as it was, on the same files. */
  isSame(other: MemoryFds): boolean {
    const files =
      this.#files.length === other.#files.length && this.#files.every((file, at) => file === other.#files[at]);
    return files && this.#image === other.#image;
  }

  [Symbol.dispose](): void {
    this.#kernel.close(this.fds[0] as number);
  }
}

/** @returns the image, and the memories and files in the order in which it counts them. */
export function describeMemory(vm: Vm): {
  readonly image: MemoryImage;
  readonly memories: readonly HostMemory[];
  readonly files: readonly GuestMemfd[];
} {
  const slots = [...vm.memslots.values()];
  const memories = [...new Set(slots.flatMap(({ hostMemory }) => hostMemory ?? []))];
  const files = [...new Set(slots.flatMap(({ guestMemfd }) => guestMemfd ?? []))];
  const image: MemoryImage = {
    magic: MAGIC,
    version: VERSION,
    arch: vm.kvm.arch,
    pageSize: vm.kvm.pageSize,
    type: vm.type,
    files: [
      ...memories.map(({ kind, size, backing }) => ({ kind, size, alignment: backing.alignment })),
      ...files.map(({ size, flags }) => ({ kind: 'guest_memfd' as const, size, flags: Number(flags) })),
    ],
    slots: slots.map((slot) => ({
      slot: slot.slot,
      address: slot.address,
      size: slot.size,
      hostMemory: slot.hostMemory ? memories.indexOf(slot.hostMemory) : -1,
      hostOffset: slot.hostOffset,
      guestMemfd: slot.guestMemfd ? memories.length + files.indexOf(slot.guestMemfd) : -1,
      guestMemfdOffset: slot.guestMemfdOffset,
      readonly: slot.readonly,
      logDirtyPages: slot.logDirtyPages,
    })),
    privateRanges: vm.attributes.privateRanges(),
  };
  return { image, memories, files };
}

/** The head says how long the image is; the rest is the user's. */
function writeImage(kernel: Kernel, image: string, data: Uint8Array): number {
  const text = new TextEncoder().encode(image);
  const bytes = new Uint8Array(8 + text.length + data.length);
  new DataView(bytes.buffer).setUint32(0, text.length, true);
  bytes.set(text, 8);
  bytes.set(data, 8 + text.length);
  const fd = checked(kernel, kernel.memfdCreate('guest-memfd-image', MFD_CLOEXEC), 'memfd_create');
  try {
    for (let done = 0; done < bytes.length; )
      done += checked(kernel, kernel.pwrite(fd, bytes.subarray(done), done), 'pwrite');
    return fd;
  } catch (error) {
    kernel.close(fd);
    throw error;
  }
}

/**
 * A VM around memory that was another's. The fds are its own from now on, or closed.
 *
 * @throws KvmError `EINVAL` it is no image, of another machine, or its files are not as it says · as kvm.createVm(), vm.createMemslot()
 */
export function adoptMemory(kvm: Kvm, kernel: Kernel, fds: readonly number[]): { vm: Vm; data: Uint8Array } {
  const left = new Set(fds);
  const made: { close(): void }[] = [];
  try {
    const { image, data } = readImage(kernel, fds[0] ?? -1);
    if (image.arch !== kvm.arch || image.pageSize !== kvm.pageSize)
      throw bad(
        `it is of ${image.arch} with pages of ${image.pageSize} bytes, and this is ${kvm.arch}, ${kvm.pageSize}`,
      );
    if (image.files.length !== fds.length - 1) throw bad(`it names ${image.files.length} files of ${fds.length - 1}`);
    const vm = kvm.createVm({ type: image.type });
    made.push(vm);
    const memories = image.files.map((file, index) => {
      const fd = fds[index + 1] as number;
      left.delete(fd);
      const memory = file.kind === 'guest_memfd' ? linked(vm, kernel, fd, file) : mapped(kvm, kernel, fd, file);
      if (memory instanceof HostMemory) made.push(memory);
      return memory;
    });
    for (const { address, size } of image.privateRanges) vm.setMemoryAttributes({ address, size }, { private: true });
    for (const slot of image.slots) showSlot(vm, slot, memories);
    return { vm, data };
  } catch (error) {
    for (const each of made) each.close();
    throw error;
  } finally {
    for (const fd of left) kernel.close(fd);
  }
}

export function showSlot(vm: Vm, slot: SlotImage, memories: readonly (HostMemory | GuestMemfd)[]): Memslot {
  const [host, file] = [memories[slot.hostMemory], memories[slot.guestMemfd]];
  const { address, size, hostOffset, guestMemfdOffset, readonly, logDirtyPages } = slot;
  return vm.createMemslot({
    slot: slot.slot & 0xffff,
    addressSpace: slot.slot >>> 16,
    address,
    size,
    ...(HostMemory.is(host) && { hostMemory: host, hostOffset }),
    ...(GuestMemfd.is(file) && { guestMemfd: file, guestMemfdOffset }),
    readonly,
    logDirtyPages,
  });
}

/** The user's data of an image that came alone. The fd is closed. */
export function imageData(kernel: Kernel, fd: number): Uint8Array {
  try {
    return readImage(kernel, fd).data;
  } finally {
    kernel.close(fd);
  }
}

function mapped(kvm: Kvm, kernel: Kernel, fd: number, file: Exclude<FileImage, { kind: 'guest_memfd' }>): HostMemory {
  const { kind, size, alignment } = file;
  try {
    const status: { size?: bigint } = {};
    checked(kernel, kernel.fstat(fd, status), 'fstat');
    // A touch behind the end would be SIGBUS.
    if (Number(status.size) < size) throw bad(`a file has ${status.size} bytes and not ${size}`);
    const args = { length: size, prot: PROT_READ | PROT_WRITE, flags: MAP_SHARED, fd, offset: 0 };
    const mapping = checked(kernel, kernel.mmap(args), 'mmap');
    return new HostMemory(internal, kvm, kernel, { kind, size, mapping, fd, alignment });
  } catch (error) {
    kernel.close(fd);
    throw error;
  }
}

function linked(
  vm: Vm,
  kernel: Kernel,
  fd: number,
  { size, flags }: Extract<FileImage, { kind: 'guest_memfd' }>,
): GuestMemfd {
  try {
    return linkGuestMemfd(vm, kernel, fd, { size, flags: BigInt(flags) });
  } finally {
    kernel.close(fd);
  }
}

/** Found by trying: a kernel that has the call looks at the fd. */
function hasLinks(kernel: Kernel, vm: Vm): boolean {
  return kernel.linkGuestMemfd(vm.backing.fd, { fd: -1, flags: 0 }) === -ERRNO.EBADF;
}

function noLinks(what: string): KvmError {
  return KvmError.unsupported(
    `${what} serves the VM that created it: a second VM needs KVM_LINK_GUEST_MEMFD, which is only proposed ('link')`,
  );
}

/** A file of another VM, as a file of this one with the same pages. */
export function linkGuestMemfd(
  vm: Vm,
  kernel: Kernel,
  fd: number,
  { size, flags }: { readonly size: number; readonly flags: bigint },
): GuestMemfd {
  if (!hasLinks(kernel, vm)) throw noLinks('a guest_memfd');
  const result = kernel.linkGuestMemfd(vm.backing.fd, { fd, flags: 0 });
  const call = { syscall: 'ioctl', request: 'KVM_LINK_GUEST_MEMFD', args: { fd } };
  if (result < 0) throw systemError(result, call, kernel.explain());
  return new GuestMemfd(internal, vm, kernel, { fd: result, size, flags });
}

function readImage(kernel: Kernel, fd: number): { image: MemoryImage; data: Uint8Array } {
  const status: { size?: bigint } = {};
  checked(kernel, kernel.fstat(fd, status), 'fstat');
  const length = Number(status.size);
  if (length < 8 || length > IMAGE_MAX) throw bad(`it has ${formatBytes(length)}`);
  const bytes = new Uint8Array(length);
  for (let done = 0; done < length; ) {
    const got = checked(kernel, kernel.pread(fd, bytes.subarray(done), done), 'pread');
    if (got === 0) throw bad('it is cut');
    done += got;
  }
  const size = new DataView(bytes.buffer).getUint32(0, true);
  if (8 + size > length) throw bad('it is cut');
  let parsed: unknown;
  try {
    parsed = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + size)));
  } catch {
    throw bad('it is no JSON');
  }
  return { image: checkedImage(parsed as MemoryImage), data: bytes.slice(8 + size) };
}

/** Every number again: it may have come from anybody. */
export function checkedImage(given: MemoryImage): MemoryImage {
  const { magic, version, arch, pageSize, type, files, slots, privateRanges } = options('image', given);
  if (magic !== MAGIC) throw bad('it does not say that it is one');
  if (version !== VERSION) throw bad(`its version is ${String(version)}, and only ${VERSION} is known`);
  if (!Array.isArray(files) || !Array.isArray(slots) || !Array.isArray(privateRanges)) throw bad('a list is none');
  return {
    magic,
    version,
    arch: oneOf('image.arch', arch, ['x86_64', 'aarch64']),
    pageSize: integer('image.pageSize', pageSize, 4096),
    type: oneOf('image.type', type, vmTypeNames),
    files: (files as FileImage[]).map((file) => {
      const kind = oneOf('file.kind', file.kind, [...hostMemoryKinds, 'guest_memfd'] as const);
      const size = integer('file.size', file.size, 1);
      if (kind === 'guest_memfd')
        return { kind, size, flags: integer('file.flags', (file as { flags: number }).flags) };
      return { kind, size, alignment: integer('file.alignment', (file as { alignment: number }).alignment, 4096) };
    }),
    slots: (slots as SlotImage[]).map((slot) => ({
      slot: integer('slot.slot', slot.slot, 0, 0xffff_ffff),
      address: integer('slot.address', slot.address),
      size: integer('slot.size', slot.size, 1),
      hostMemory: integer('slot.hostMemory', slot.hostMemory, -1, files.length - 1),
      hostOffset: integer('slot.hostOffset', slot.hostOffset),
      guestMemfd: integer('slot.guestMemfd', slot.guestMemfd, -1, files.length - 1),
      guestMemfdOffset: integer('slot.guestMemfdOffset', slot.guestMemfdOffset),
      readonly: boolean('slot.readonly', slot.readonly),
      logDirtyPages: boolean('slot.logDirtyPages', slot.logDirtyPages),
    })),
    privateRanges: (privateRanges as GuestRange[]).map((range) => guestRange('image.privateRanges', range)),
  };
}

export function bad(why: string): KvmError {
  return new KvmError({ code: 'EINVAL', message: `what came is no memory image that can be taken: ${why}` });
}

export function checked(kernel: Kernel, result: Result, syscall: string): number {
  if (result < 0) throw systemError(result, { syscall }, kernel.explain());
  return result;
}
