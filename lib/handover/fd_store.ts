import { KvmError, systemError } from '../errors.ts';
import { bytes } from '../kernel/arguments.ts';
import type { Kernel } from '../kernel/kernel.ts';
import { LinuxKernel } from '../kernel/linux/linux_kernel.ts';
import { Kvm } from '../kvm.ts';
import { ERRNO, SOCK_DGRAM } from '../uapi.ts';
import { options, rangeError, text, typeError } from '../validate.ts';
import { Vm } from '../vm.ts';
import { freeze } from './freeze.ts';
import type { TakenMemory } from './hand_over.ts';
import { adoptMemory, checked, MemoryFds } from './memory_image.ts';

export interface FdStoreOptions {
  /** By which the next start of the service finds the memory; 'guest-memfd' when omitted. Letters, digits, '-', '_' and '.'. */
  readonly name?: string;
  /** For the next start: registers, device states, whatever the memory does not hold. */
  readonly data?: Uint8Array;
}

/** Memory that systemd keeps. The VM is frozen as long as it does. */
export interface MemoryInSystemd {
  /** Bytes of guest memory in the store, none of which was copied. */
  readonly bytes: number;
  /**
   * Has systemd let go of it, and thaws the VM. A second call does nothing.
   *
   * @throws KvmError `ENOENT`, `ECONNREFUSED` systemd is not there any more; the VM is thawed all the same
   */
  cancel(): void;
}

const FIRST_FD = 3;
const DEFAULT_NAME = 'guest-memfd';
/** Milliseconds that systemd's queue may stay full. */
const TRIES = 1000;

/**
 * Gives the files of a VM's memory to systemd, which keeps them while the service is restarted: `FDSTORE=1` of the notify protocol. No vCPU may
 * run; from now on the VM is frozen (`EPERM`), until it is closed or the store is cancelled. The unit needs FileDescriptorStoreMax= and
 * NotifyAccess=; a store that is full drops files, and says so only in the journal.
 *
 * @throws KvmError `UNSUPPORTED` no $NOTIFY_SOCKET, the software kernel, or memory as for handOver() · `EBUSY`, `EPERM` as for handOver() · `ERR_CLOSED`
 * @see sd_notify(3), sd_pid_notify_with_fds(3)
 */
export function storeInSystemd(vm: Vm, given: FdStoreOptions = {}): MemoryInSystemd {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  const { name: wanted, data = new Uint8Array() } = options('options', given);
  const [name, plain] = [storeName(wanted), bytes('options.data', data)];
  const { kernel, assertOpen, assertOwn } = vm.backing;
  assertOpen();
  assertOwn();
  linuxOnly(kernel);
  const path = process.env.NOTIFY_SOCKET;
  if (!path)
    throw KvmError.unsupported(
      'there is no $NOTIFY_SOCKET: this process is no service of systemd, or its unit has no NotifyAccess=',
    );
  const thaw = freeze(vm, 'systemd keeps the memory of this VM: cancel that, or close the VM');
  try {
    using memory = new MemoryFds(vm, plain);
    const names = memory.fds.map((_, index) => `${name}.${index}`);
    notify(kernel, path, (send) => {
      for (const [index, fd] of memory.fds.entries()) send(`FDSTORE=1\nFDNAME=${names[index]}`, fd);
    });
    let kept = true;
    return {
      bytes: memory.bytes,
      cancel() {
        if (!kept) return;
        kept = false;
        thaw();
        notify(kernel, path, (send) => {
          for (const each of names) send(`FDSTOREREMOVE=1\nFDNAME=${each}`);
        });
      },
    };
  } catch (error) {
    thaw();
    throw error;
  }
}

/**
 * The memory that systemd kept for this service, and a VM around it: once, at the start of the process, before anything else opens files.
 *
 * @throws KvmError `ENOENT` systemd has kept nothing by this name · `UNSUPPORTED` the software kernel · as takeOver()
 * @see sd_listen_fds_with_names(3)
 */
export function takeFromSystemd(kvm: Kvm, given: Pick<FdStoreOptions, 'name'> = {}): TakenMemory {
  if (!(kvm instanceof Kvm)) throw typeError('kvm must be a Kvm');
  const name = storeName(options('options', given).name);
  const { kernel, assertOpen } = kvm.backing;
  assertOpen();
  const linux = linuxOnly(kernel);
  const { LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES = '' } = process.env;
  const count = Number(LISTEN_PID) === process.pid ? Number(LISTEN_FDS) : 0;
  const byName = new Map(
    LISTEN_FDNAMES.split(':')
      .slice(0, count)
      .map((each, index) => [each, FIRST_FD + index]),
  );
  const fds: number[] = [];
  for (let fd = byName.get(`${name}.0`); fd !== undefined; fd = byName.get(`${name}.${fds.length}`)) {
    const adopted = linux.adopt(fd, 'file');
    if (adopted >= 0) {
      fds.push(adopted);
      continue;
    }
    for (const each of fds) kernel.close(each);
    throw systemError(adopted, { syscall: 'fcntl', args: { fd } }, `fd ${fd} was taken already, or is not open`);
  }
  if (fds.length === 0)
    throw new KvmError({
      code: 'ENOENT',
      message: `systemd has kept no memory by the name '${name}' for this process`,
    });
  return adoptMemory(kvm, kernel, fds);
}

function storeName(name: string = DEFAULT_NAME): string {
  if (!/^[\w.-]{1,200}$/.test(text('options.name', name)))
    throw rangeError(`options.name must have 1 to 200 letters, digits, '-', '_' and '.'`);
  return name;
}

function linuxOnly(kernel: Kernel): LinuxKernel {
  if (kernel instanceof LinuxKernel) return kernel;
  throw KvmError.unsupported('the files of a software kernel live and die with its process: systemd cannot keep them');
}

function notify(kernel: Kernel, path: string, run: (send: (message: string, fd?: number) => void) => void): void {
  const socket = checked(kernel, kernel.socket(SOCK_DGRAM), 'socket');
  try {
    const connected = kernel.connect(socket, path);
    if (connected < 0)
      throw systemError(connected, { syscall: 'connect', args: { path } }, `$NOTIFY_SOCKET, ${path}, does not answer`);
    run((message, fd) => {
      const text = new TextEncoder().encode(message);
      const fds = fd === undefined ? [] : [fd];
      let result = kernel.sendmsg(socket, text, fds);
      // systemd reads a few at a time.
      for (let tries = 0; result === -ERRNO.EAGAIN && tries < TRIES; tries++) {
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1);
        result = kernel.sendmsg(socket, text, fds);
      }
      checked(kernel, result, 'sendmsg');
    });
  } finally {
    kernel.close(socket);
  }
}
