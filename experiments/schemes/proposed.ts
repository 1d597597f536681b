import { GuestAgent, Kvm, type Proposal } from 'guest-memfd';
import { GRANT, GRANT_RING, type GrantCounts } from '../../lib/kernel/software/grant_ring.ts';
import { softwareKernel } from '../../lib/kernel/software/index.ts';
import type { SoftwareKernel } from '../../lib/kernel/software/software_kernel.ts';
import { internal } from '../../lib/resource.ts';
import {
  KVM_MEMORY_ATTRIBUTE_PRIVATE,
  MAP_SHARED,
  MAP_SHARED_VALIDATE,
  PROT_READ,
  PROT_WRITE,
} from '../../lib/uapi.ts';
import { GUEST_MEMFD_FLAG_WRITE, KVM_CAP_PROPOSED, MAP_GUEST_SHARED } from '../../lib/uapi_proposed.ts';
import type { Meter } from '../meter.ts';
import {
  AREA,
  AREAS,
  ask,
  DATA,
  HOME,
  hostOf,
  pagesOf,
  pieces,
  type Request,
  type Scheme,
  type Session,
} from './scheme.ts';

// What needs one memory for both sides, and more that is only proposed: on the model of it.

const RING = HOME / 2;
/** As many as fit in its page. */
const ENTRIES = 256;

/** A guest whose data is private pages of a file, which it converts in place by asking. */
class Place {
  readonly kernel: SoftwareKernel;
  readonly kvm: Kvm;
  readonly vm: number;
  readonly file: number;
  readonly agent: GuestAgent;
  readonly #meter: Meter;

  constructor(meter: Meter, proposals: readonly Proposal[], data: Uint8Array, flags = 0n) {
    this.#meter = meter;
    this.kernel = meter.watch(softwareKernel({ proposals: ['in-place-conversion', ...proposals] }));
    this.kvm = new Kvm(internal, this.kernel, this.kernel.openKvm(), null);
    const vm = this.kvm.createVm({ type: 'sw-protected' });
    const hostMemory = this.kvm.createHostMemory({ size: HOME });
    const guestMemfd = vm.createGuestMemfd({ size: AREAS * AREA, mmap: true, flags });
    vm.createMemslot({ address: 0, size: HOME, hostMemory });
    vm.createMemslot({ address: DATA, size: AREAS * AREA, guestMemfd });
    this.vm = vm.backing.fd;
    this.file = guestMemfd.fd;
    this.agent = GuestAgent.boot(vm, {
      address: 0,
      onExit: (exit) => {
        if (exit.reason !== 'map-gpa-range') return 'stop';
        const attributes = exit.to === 'private' ? KVM_MEMORY_ATTRIBUTE_PRIVATE : 0;
        const args = { offset: exit.address - DATA, size: exit.size, attributes, flags: 0 };
        exit.reply(BigInt(this.kernel.setMemoryAttributes2(this.file, args)));
        return 'resume';
      },
    });
    this.agent.write(DATA, data);
  }

  map({ offset, length }: { offset: number; length: number }, flags: number): number {
    const prot = PROT_READ | PROT_WRITE;
    return succeeded('mmap', this.kernel.mmap({ length, prot, flags, fd: this.file, offset }));
  }

  /** The guest shares the pages of a request for as long as `take` takes. */
  whileShared(request: Request, take: (file: { readonly offset: number; readonly length: number }) => void): void {
    const range = pagesOf(request, this.kvm.pageSize);
    ask(this.agent, this.#meter, range, { to: 'shared', notifies: true });
    take({ offset: range.address - DATA, length: range.size });
    ask(this.agent, this.#meter, range, { to: 'private', notifies: false });
  }

  session(request: Session['request']): Session {
    const { kvm } = this;
    return { host: hostOf(kvm), real: false, request, [Symbol.dispose]: () => kvm.close() };
  }
}

export const mapEach: Scheme = {
  key: 'map-each',
  name: 'share + mmap + munmap + unshare',
  needs: 'in-place conversion',
  open(meter, _backend, data) {
    const place = new Place(meter, [], data);
    const { kernel } = place;
    return place.session((request, device) => {
      place.whileShared(request, (pages) => {
        const mapping = place.map(pages, MAP_SHARED);
        device(kernel.window(mapping, 0, request.size), 0);
        succeeded('munmap', kernel.munmap(mapping));
      });
    });
  },
};

export const specialMapping: Scheme = {
  key: 'special-mapping',
  name: 'special mapping',
  needs: 'in-place conversion, MAP_GUEST_SHARED',
  open(meter, _backend, data) {
    const place = new Place(meter, ['special-mapping'], data);
    const mapping = place.map({ offset: 0, length: AREAS * AREA }, MAP_SHARED_VALIDATE | MAP_GUEST_SHARED);
    return place.session((request, device) => {
      place.whileShared(request, ({ offset }) => device(place.kernel.window(mapping, offset, request.size), 0));
    });
  },
};

export const pread: Scheme = {
  key: 'pread',
  name: 'pread / pwrite',
  needs: 'in-place conversion, GUEST_MEMFD_FLAG_WRITE',
  open(meter, _backend, data) {
    const place = new Place(meter, ['write-population'], data, BigInt(GUEST_MEMFD_FLAG_WRITE));
    const buffer = new Uint8Array(AREA);
    return place.session((request, device) => {
      place.whileShared(request, ({ offset }) => {
        const target = buffer.subarray(0, request.size);
        meter.copied(succeeded('pread', place.kernel.pread(place.file, target, offset)));
        device(target, 0);
      });
    });
  },
};

/** The guest revokes a request's pages together with the grants of the next one. */
export const grantRing: Scheme = {
  key: 'grant-ring',
  name: 'grant ring',
  needs: 'in-place conversion, KVM_CAP_GRANT_RING',
  open(meter, _backend, data) {
    const place = new Place(meter, ['grant-ring'], data);
    const { kernel, vm, agent } = place;
    const { pageSize } = place.kvm;
    const args = [RING, ENTRIES, 0, 0];
    succeeded('KVM_ENABLE_CAP', kernel.enableCap(vm, { cap: KVM_CAP_PROPOSED.GRANT_RING, flags: 0, args }));
    const mapping = place.map({ offset: 0, length: AREAS * AREA }, MAP_SHARED);
    let head = 0;
    let granted: readonly number[] = [];
    const entries = (values: readonly number[]): void => {
      for (let done = 0; done < values.length; ) {
        const at = head % ENTRIES;
        const some = values.slice(done, done + ENTRIES - at);
        agent.write(RING + GRANT_RING.entries + 8 * at, new Uint8Array(BigUint64Array.from(some, BigInt).buffer));
        meter.scripted();
        head += some.length;
        done += some.length;
      }
      agent.write(RING + GRANT_RING.head, new Uint8Array(Uint32Array.of(head).buffer));
    };
    return place.session((request, device) => {
      const { address, size } = pagesOf(request, pageSize);
      const pages = Array.from({ length: size / pageSize }, (_, page) => address + page * pageSize);
      const wanted = [...granted.map((page) => page + GRANT.revoke), ...pages];
      const before = countsOf(kernel, vm);
      for (const { offset, size } of pieces(wanted.length, ENTRIES)) entries(wanted.slice(offset, offset + size));
      const { flushes, lost, refused } = countsOf(kernel, vm);
      if (lost + refused > 0) throw new Error(`the host missed ${lost} entries of the guest's and refused ${refused}`);
      meter.flushed(flushes - before.flushes);
      granted = pages;
      const window = kernel.window(mapping, address - DATA, request.size);
      device(window, 0);
      kernel.releaseWindow(window);
    });
  },
};

function succeeded(call: string, result: number): number {
  if (result < 0) throw new Error(`${call}: errno ${-result}`);
  return result;
}

function countsOf(kernel: SoftwareKernel, vm: number): Readonly<GrantCounts> {
  const counts = kernel.grantCounts(vm);
  if (typeof counts === 'number') throw new Error('the VM has no ring of grants');
  return counts;
}
