import { KvmError } from '../errors.ts';
import type { GuestMemfd } from '../guest_memfd.ts';
import type { GuestRange } from '../guest_range.ts';
import type { HostMemory } from '../host_memory.ts';
import { checkedListener, type MemoryUser, type MemoryUserOptions } from '../memory_user.ts';
import type { Memslot } from '../memslot.ts';
import { options, typeError } from '../validate.ts';
import type { Vcpu } from '../vcpu.ts';
import { Vm } from '../vm.ts';
import { corrupt } from './disk.ts';
import { type Metadata, pageRanges, type StoredRegion } from './metadata.ts';
import { isVcpuState, loadVcpu } from './vcpu_state.ts';

export interface AttachOptions {
  /** By the name of a device of the ledger, what it wants to know of conversions from now on. */
  readonly users?: Readonly<Record<string, Omit<MemoryUserOptions, 'name'>>>;
}

type Listeners = ReadonlyMap<string, Omit<MemoryUserOptions, 'name'>>;

/** Read before anything is made, so that what is wrong with them changes nothing. */
export function listenersOf(given: AttachOptions): Listeners {
  const { users } = options('options', given);
  if (users === undefined) return new Map();
  return new Map(
    Object.entries(options('users', users)).map(([name, listener]) => {
      const { converting, converted, kept, discarding } = options(`users.${name}`, listener);
      return [name, checkedListener({ converting, converted, kept, discarding })];
    }),
  );
}

export interface Rebuilt {
  readonly users: readonly MemoryUser[];
  readonly vcpus: readonly Vcpu[];
  readonly lost: readonly GuestRange[];
}

/** Host memory of a region, and where in it the region begins. */
export interface HostSide {
  readonly memory: HostMemory;
  readonly offset: number;
}

/** @throws KvmError `EINVAL` the VM cannot have this memory · `EEXIST` it has memslots */
export function assertFits(vm: Vm, { arch, vmType, pageSize, vcpus }: Metadata): void {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  vm.backing.assertOpen();
  vm.backing.assertOwn();
  if (vm.memslots.size > 0)
    throw new KvmError({ code: 'EEXIST', message: 'the VM has memslots already: give a new one' });
  const wrong =
    (arch !== vm.kvm.arch && `of ${arch}, and this is ${vm.kvm.arch}`) ||
    (pageSize !== vm.kvm.pageSize && `of pages of ${pageSize} bytes, and here they have ${vm.kvm.pageSize}`) ||
    (vmType !== vm.type && `of a VM of type '${vmType}', and this one is of type '${vm.type}'`);
  if (wrong) throw new KvmError({ code: 'EINVAL', message: `the memory is ${wrong}` });
  if (!vcpus.every(({ state }) => isVcpuState(state, arch === 'aarch64')))
    throw corrupt('the stored state of a vCPU is none');
}

/** Shows the memory to a VM as it was shown before; on any failure the VM has nothing of it. */
export function rebuild(
  vm: Vm,
  metadata: Metadata,
  host: (region: StoredRegion) => HostSide,
  fill: (region: StoredRegion, file: GuestMemfd) => void,
  listeners: Listeners,
): Rebuilt {
  const undo: (() => void)[] = [];
  try {
    const hosts = metadata.regions.map((region) => (region.kind === 'host' ? host(region) : null));
    const files = metadata.regions.map((region) => {
      if (region.kind === 'host') return null;
      const file = vm.createGuestMemfd({ size: region.size, flags: region.flags });
      undo.push(() => file.close());
      if (region.dataOffset !== null) fill(region, file);
      return file;
    });
    for (const stored of metadata.slots) {
      const { host: hostIndex, guestMemfd: fileIndex, ...rest } = stored;
      const side = hostIndex === null ? null : hosts[hostIndex];
      const file = fileIndex === null ? null : files[fileIndex];
      const slot: Memslot = vm.createMemslot({
        ...{ address: rest.address, size: rest.size, slot: rest.slot & 0xffff, addressSpace: rest.slot >>> 16 },
        ...(side && { hostMemory: side.memory, hostOffset: side.offset + rest.hostOffset }),
        ...(file && { guestMemfd: file, guestMemfdOffset: rest.guestMemfdOffset }),
        ...(rest.readonly && { readonly: true }),
        ...(rest.logDirtyPages && { logDirtyPages: true }),
      });
      undo.push(() => slot.remove());
    }
    restoreAttributes(vm, metadata, undo);
    const users = metadata.users.map(({ name, holds }) => {
      const user = vm.addMemoryUser({ ...listeners.get(name), name });
      undo.push(() => user.remove());
      for (const range of holds) user.hold(range);
      return user;
    });
    const vcpus = metadata.vcpus.map(({ id, state }) => {
      const vcpu = vm.createVcpu(id);
      undo.push(() => vcpu.close());
      loadVcpu(vcpu, state);
      return vcpu;
    });
    return { users, vcpus, lost: lostRanges(vm) };
  } catch (error) {
    for (const step of undo.reverse()) step();
    throw error;
  }
}

function restoreAttributes(vm: Vm, { privatePages, pageSize }: Metadata, undo: (() => void)[]): void {
  for (const { start, end } of pageRanges(privatePages)) {
    const range = { address: start * pageSize, size: (end - start) * pageSize };
    // Pages of a file that nobody else can have are private from the start.
    if (vm.attributes.state(range) === 'private') continue;
    if (vm.capabilities.memoryAttributes !== 0n) {
      undo.push(() => vm.setMemoryAttributes(range, { private: false }));
      vm.setMemoryAttributes(range, { private: true });
    } else vm.convertSync(range, 'private', { content: 'unspecified' });
  }
}

/** What was private was in a guest_memfd, which ended with its VM. */
function lostRanges(vm: Vm): GuestRange[] {
  return [...vm.memslots.values()]
    .filter(({ slot, guestMemfd }) => slot < 0x10000 && guestMemfd)
    .flatMap((slot) => vm.attributes.privateRanges(slot));
}
