import { KvmError } from '../errors.ts';
import { formatRange } from '../format.ts';
import type { GuestMemfd } from '../guest_memfd.ts';
import type { HostMemory } from '../host_memory.ts';
import { typeError } from '../validate.ts';
import { Vcpu } from '../vcpu.ts';
import { Vm } from '../vm.ts';
import { encodeRanges, type Metadata, type StoredRegion } from './metadata.ts';
import { saveVcpu } from './vcpu_state.ts';

export type Layout = Omit<Metadata, 'size' | 'isSnapshot' | 'tags'>;

/** The vCPUs of a VM that are to be kept. */
export function vcpusOf(vm: Vm, given: readonly Vcpu[] | undefined): Vcpu[] {
  if (!(vm instanceof Vm)) throw typeError('vm must be a Vm');
  if (given === undefined) return [];
  if (!Array.isArray(given)) throw typeError('vcpus must be an array');
  return Array.from(given as readonly Vcpu[], (vcpu) => {
    if (!(vcpu instanceof Vcpu)) throw typeError('vcpus must be an array of Vcpu');
    if (vcpu.closed) throw KvmError.closed(`vCPU ${vcpu.id}`);
    if (vcpu.handle.vm !== vm) throw new KvmError({ code: 'EINVAL', message: `vCPU ${vcpu.id} is of another VM` });
    return vcpu;
  });
}

/**
 * What a VM has made of memory.
 *
 * @param data Where in the data file the bytes of each memory are.
 * @throws KvmError `EINVAL` a memslot shows memory of which the host could keep the bytes, and they are not there
 */
export function capture(vm: Vm, data: ReadonlyMap<HostMemory | GuestMemfd, number>, vcpus: readonly Vcpu[]): Layout {
  const { kvm } = vm;
  vm.backing.assertOpen();
  vm.backing.assertOwn();
  const indexes = new Map<HostMemory | GuestMemfd, number>();
  const regions: StoredRegion[] = [];
  const region = (memory: HostMemory | GuestMemfd, made: StoredRegion): number => {
    const index = indexes.get(memory) ?? regions.push(made) - 1;
    indexes.set(memory, index);
    return index;
  };
  const slots = [...vm.memslots.values()].map((slot) => {
    const { hostMemory, guestMemfd } = slot;
    const missing = [hostMemory, guestMemfd?.backing.hostAccessible ? guestMemfd : null].find(
      (memory) => memory && !data.has(memory),
    );
    if (missing)
      throw new KvmError({
        code: 'EINVAL',
        message: `slot ${slot.slot} ${formatRange(slot.address, slot.size)} shows memory that is not in the store: use the stored memory's hostMemory`,
      });
    return {
      slot: slot.slot,
      address: slot.address,
      size: slot.size,
      host:
        hostMemory &&
        region(hostMemory, {
          kind: 'host',
          size: hostMemory.size,
          flags: 0n,
          dataOffset: data.get(hostMemory) ?? 0,
        }),
      hostOffset: slot.hostOffset,
      guestMemfd:
        guestMemfd &&
        region(guestMemfd, {
          kind: 'guest-memfd',
          size: guestMemfd.size,
          flags: guestMemfd.flags,
          dataOffset: data.get(guestMemfd) ?? null,
        }),
      guestMemfdOffset: slot.guestMemfdOffset,
      readonly: slot.readonly,
      logDirtyPages: slot.logDirtyPages,
    };
  });
  const secret = vm.attributes.privateRanges();
  const pages = secret.map(({ address, size }) => ({
    start: address / kvm.pageSize,
    end: (address + size) / kvm.pageSize,
  }));
  return {
    arch: kvm.arch,
    vmType: vm.type,
    pageSize: kvm.pageSize,
    regions,
    slots,
    users: Array.from(vm.backing.users, ({ name, holds }) => ({ name, holds: holds.map(({ range }) => range) })),
    vcpus: vcpus.map(saveVcpu),
    privatePages: encodeRanges(pages, pages.length),
  };
}
