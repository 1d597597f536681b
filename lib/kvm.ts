import { KvmError, systemError } from './errors.ts';
import { HostMemory, type HostMemoryOptions } from './host_memory.ts';
import type { Kernel, Result } from './kernel/kernel.ts';
import { linuxKernel } from './kernel/linux/linux_kernel.ts';
import { softwareKernel } from './kernel/software/index.ts';
import type { Arch, ModelOptions } from './model_options.ts';
import { closing, guardConstructor, internal, Resource } from './resource.ts';
import { GuestMemoryStore, type StoreOptions } from './store/guest_memory_store.ts';
import { ERRNO, KVM_API_VERSION, KVM_CAP } from './uapi.ts';
import { integer, oneOf, options, rangeError, text } from './validate.ts';
import { Vm } from './vm.ts';
import { armVmTypes, type VmType, vmTypeNames, vmTypeNeeds, x86VmTypes } from './vm_type.ts';

export type BackendName = 'kvm' | 'software';

export interface OpenOptions {
  /** 'auto' (default) takes /dev/kvm when it opens and otherwise the software kernel, and says why in `fallbackReason`. */
  readonly backend?: 'auto' | BackendName;
  /** Another path than /dev/kvm. */
  readonly device?: string;
  /** Which kernel the software backend plays. */
  readonly model?: ModelOptions;
}

export interface VmOptions {
  /** 'default' unless given; `kvm.vmTypes` says which can be created. */
  readonly type?: VmType;
  /** arm64: bits of guest physical address, 32 to the host's limit; 40 when omitted. */
  readonly ipaBits?: number;
}

/** The number of a KVM capability given by name or number. */
export function capabilityNumber(capability: string | number): number {
  if (typeof capability === 'number') return integer('capability', capability, 0, 0x7fffffff);
  const name = text('capability', capability).replace(/^KVM_CAP_/, '');
  if (Object.hasOwn(KVM_CAP, name)) return KVM_CAP[name as keyof typeof KVM_CAP];
  throw rangeError(
    `capability ${JSON.stringify(capability)} has no name here: give its number, or one of ${Object.keys(KVM_CAP).join(', ')}`,
  );
}

/**
 * KVM, opened: the real one of the host, or the software kernel that answers like it.
 *
 * @see /dev/kvm
 */
export class Kvm extends Resource {
  readonly backend: BackendName;
  /** With `backend: 'auto'`: why it is the software kernel; null on real KVM, or when the software kernel was asked for. */
  readonly fallbackReason: KvmError | null;
  readonly arch: Arch;
  /** `uname -r`, or the version the software kernel plays. */
  readonly kernelRelease: string;
  /** Bytes. */
  readonly pageSize: number;
  /** 12. */
  readonly apiVersion: number;
  readonly #kernel: Kernel;
  readonly #fd: number;
  #vmTypes: ReadonlySet<VmType> | null = null;

  /**
   * @throws KvmError `UNSUPPORTED` the addon or /dev/kvm is missing · `EACCES` no permission, naming the group to join · TypeError,
   *   RangeError for options that cannot be
   */
  static open(given: OpenOptions = {}): Kvm {
    const { backend = 'auto', device = '/dev/kvm', model } = options('options', given);
    oneOf('backend', backend, ['auto', 'kvm', 'software']);
    text('device', device);
    if (model !== undefined) options('model', model);
    let reason: KvmError | null = null;
    if (backend !== 'software') {
      try {
        const kernel = linuxKernel();
        return new Kvm(internal, kernel, openDevice(kernel, device), null);
      } catch (error) {
        if (backend === 'kvm' || !(error instanceof KvmError)) throw error;
        reason = error;
      }
    }
    const kernel = softwareKernel(model);
    return new Kvm(internal, kernel, kernel.openKvm(), reason);
  }

  /** @internal */
  constructor(token: typeof internal, kernel: Kernel, fd: number, reason: KvmError | null) {
    guardConstructor(token, 'Kvm.open()');
    super(null, 'KVM', closing(kernel, fd));
    this.#kernel = kernel;
    this.#fd = fd;
    this.backend = kernel.name === 'linux' ? 'kvm' : 'software';
    this.fallbackReason = reason;
    this.arch = kernel.arch;
    this.kernelRelease = kernel.release;
    this.pageSize = kernel.pageSize;
    this.apiVersion = kernel.getApiVersion(fd);
    Object.freeze(this);
  }

  /** @internal The Kvm of another thread, by its share. */
  static attach(token: typeof internal, kernel: Kernel, share: number): Kvm {
    const fd = kernel.takeFile(share, 'kvm');
    if (fd < 0) throw KvmError.closed('the VM of this handle');
    return new Kvm(token, kernel, fd, null);
  }

  /** @internal The number for attach(). */
  share(): number {
    const share = this.#kernel.shareFile(this.#fd);
    if (share < 0) throw shareError(this.#kernel, share, 'KVM');
    return share;
  }

  /** @internal */
  get backing() {
    return { kernel: this.#kernel, fd: this.#fd, assertOpen: () => this.assertOpen() };
  }

  /** The types of VM that can be created here. */
  get vmTypes(): ReadonlySet<VmType> {
    this.assertOpen();
    this.#vmTypes ??= this.#askVmTypes();
    return new Set(this.#vmTypes);
  }

  /**
   * What some VM of this kernel could do; ask the VM for what it can.
   *
   * @param capability By name ('GUEST_MEMFD') or number.
   * @see KVM_CHECK_EXTENSION
   */
  checkExtension(capability: string | number): number {
    const number = capabilityNumber(capability);
    this.assertOpen();
    return this.#check(this.#kernel.checkExtension(this.#fd, number), 'KVM_CHECK_EXTENSION', { capability });
  }

  /**
   * @throws KvmError `UNSUPPORTED` a type this host cannot create, naming what it needs · `EINVAL` ipaBits · `EMFILE`, `ENOMEM` · `ERR_CLOSED`
   * @see KVM_CREATE_VM
   */
  createVm(given: VmOptions = {}): Vm {
    const { type: wanted = 'default', ipaBits } = options('options', given);
    const type = oneOf('type', wanted, vmTypeNames);
    if (ipaBits !== undefined) integer('ipaBits', ipaBits, 32, 64);
    this.assertOpen();
    if (ipaBits !== undefined) {
      if (this.arch !== 'aarch64') throw KvmError.unsupported('ipaBits exist on aarch64 only');
    }
    const number = (this.arch === 'aarch64' ? armVmTypes : x86VmTypes).get(type);
    if (number === undefined || !this.vmTypes.has(type)) {
      throw KvmError.unsupported(
        `this host cannot create VMs of type '${type}', which need ${vmTypeNeeds[type]}; it has ${[...this.vmTypes].join(', ')}`,
      );
    }
    const fd = this.#check(this.#createVm(number + (ipaBits ?? 0)), 'KVM_CREATE_VM', { type: number, ipaBits });
    return new Vm(internal, this, this.#kernel, fd, type);
  }

  /**
   * Memory of this process to show to guests.
   *
   * @throws KvmError `ENOMEM` and others of the system calls behind it · `ERR_CLOSED` · TypeError, RangeError for options that cannot be
   */
  createHostMemory(given: HostMemoryOptions): HostMemory {
    return HostMemory.create(internal, this, this.#kernel, given, () => this.assertOpen());
  }

  /**
   * A place for guest memory that outlives this process: a folder, which is created when missing, on a file system that keeps what it is given
   * as long as it has to be kept (tmpfs: until the host restarts).
   *
   * @throws KvmError `EBUSY` another one writes to it, and this one was not asked to be `readOnly` · `EINVAL` it is on hugetlbfs, where only `data` can
   *   be · `EACCES`, `ENOENT`, `ENOSPC` and others of the system calls behind it · `ERR_CLOSED`
   */
  openStore(path: string, given: StoreOptions = {}): GuestMemoryStore {
    return GuestMemoryStore.open(internal, this, this.#kernel, path, given, () => this.assertOpen());
  }

  /** A signal to the process (a profiler's, a timer's) interrupts the creation, and nothing of it remains then. */
  #createVm(type: number): Result {
    let result: Result;
    do result = this.#kernel.createVm(this.#fd, type);
    while (result === -ERRNO.EINTR);
    return result;
  }

  #askVmTypes(): ReadonlySet<VmType> {
    if (this.arch === 'aarch64') {
      // Only a pKVM host ignores the address bits, so this finds out without creating a protected VM, which would taint the kernel.
      const trial = this.#createVm(1);
      if (trial < 0) return new Set<VmType>(['default']);
      this.#kernel.close(trial);
      return new Set<VmType>(['default', 'protected']);
    }
    const mask = this.#kernel.checkExtension(this.#fd, KVM_CAP.VM_TYPES);
    return new Set([...x86VmTypes].filter(([, number]) => number === 0 || (mask >> number) & 1).map(([name]) => name));
  }

  #check(result: Result, request: string, args: Readonly<Record<string, unknown>>): number {
    if (result < 0) throw systemError(result, { syscall: 'ioctl', request, args }, this.#kernel.explain());
    return result;
  }
}

/** Why another thread cannot have something. */
export function shareError(kernel: Kernel, result: Result, what: string): KvmError {
  if (result === -ERRNO.EOPNOTSUPP)
    return KvmError.unsupported(`another thread cannot have ${what}: ${kernel.explain()}`);
  return systemError(result, { syscall: 'share' }, kernel.explain());
}

function openDevice(kernel: Kernel, device: string): number {
  const fd = kernel.openKvm(device);
  if (fd < 0) throw cannotOpen(fd, device);
  const version = kernel.getApiVersion(fd);
  if (version === KVM_API_VERSION) return fd;
  kernel.close(fd);
  throw KvmError.unsupported(
    version < 0
      ? `${device} is not KVM`
      : `${device} has KVM API version ${version}, and only ${KVM_API_VERSION} is known`,
  );
}

function cannotOpen(result: Result, device: string): KvmError {
  const call = { syscall: 'open', args: { path: device } };
  switch (-result) {
    case ERRNO.EACCES:
    case ERRNO.EPERM:
      return systemError(
        result,
        call,
        `no permission on ${device}: join the group that owns it (usually \`sudo usermod -aG kvm $USER\`, then log in again)`,
      );
    case ERRNO.ENOENT:
    case ERRNO.ENODEV:
    case ERRNO.ENXIO:
      return new KvmError({
        code: 'UNSUPPORTED',
        errno: result,
        ...call,
        message: `there is no ${device}: load the kvm_intel or kvm_amd module, switch on virtualization in the firmware (or nested virtualization for this VM), or pass the device to the container (--device ${device})`,
      });
    default:
      return systemError(result, call, `${device} cannot be opened as KVM`);
  }
}
