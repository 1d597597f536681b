import { ConversionPolicy, GuestAgent } from 'guest-memfd';
import { BUFFER_SIZE, LAYOUT } from '../../lib/agent/protocol.ts';
import { AREA, AREAS, ask, DATA, hostOf, metered, pagesOf, pieces, type Scheme } from './scheme.ts';

// What needs nothing but released kernels.

/** The guest's memory is private where the host has such VMs; elsewhere the guest copies all the same. */
export const bounce: Scheme = {
  key: 'bounce',
  name: 'bounce buffer',
  needs: '',
  open(meter, backend, data) {
    const kvm = metered(meter, backend, false);
    const type = kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default';
    const vm = kvm.createVm({ type });
    const hostMemory = kvm.createHostMemory({ size: DATA + AREAS * AREA });
    const size = hostMemory.size;
    if (type === 'sw-protected') {
      vm.createMemslot({ address: 0, size, hostMemory, guestMemfd: vm.createGuestMemfd({ size }) });
      vm.convertSync({ address: DATA, size: AREAS * AREA }, 'private');
    } else {
      vm.createMemslot({ address: 0, size, hostMemory });
    }
    const agent = GuestAgent.boot(vm, { address: 0 });
    agent.write(DATA, data);
    return {
      host: hostOf(kvm),
      real: kvm.backend === 'kvm',
      request({ area, size }, device) {
        for (const piece of pieces(size, BUFFER_SIZE)) {
          const address = DATA + area * AREA + piece.offset;
          // The guest copies into the buffer that it shares with the host, and rings.
          meter.copied(agent.read(address, piece.size).length);
          device(vm.memory.view(agent.address + LAYOUT.buffer, piece.size), piece.offset);
        }
      },
      [Symbol.dispose]: () => kvm.close(),
    };
  },
};

/** The page that appears is another one than the page that goes: what the guest has to say it writes after the conversion. */
export const twoMemories: Scheme = {
  key: 'two-memories',
  name: 'share + unshare, two memories',
  needs: '',
  open(meter, backend, data) {
    const kvm = metered(meter, backend === 'kvm' ? 'auto' : backend, true);
    const vm = kvm.createVm({ type: 'sw-protected' });
    const size = DATA + AREAS * AREA;
    const hostMemory = kvm.createHostMemory({ size, kind: 'memfd' });
    vm.createMemslot({ address: 0, size, hostMemory, guestMemfd: vm.createGuestMemfd({ size }) });
    vm.convertSync({ address: DATA, size: AREAS * AREA }, 'private');
    const agent = GuestAgent.boot(vm, { address: 0, onExit: new ConversionPolicy(vm).handle });
    return {
      host: hostOf(kvm),
      real: kvm.backend === 'kvm',
      request(request, device) {
        const range = pagesOf(request, kvm.pageSize);
        const start = request.area * AREA;
        ask(agent, meter, range, { to: 'shared', notifies: false });
        for (const { offset, size } of pieces(request.size, BUFFER_SIZE)) {
          agent.write(range.address + offset, data.subarray(start + offset, start + offset + size));
          meter.copied(size);
          if (offset + size < request.size) meter.scripted();
        }
        device(vm.memory.view(range.address, request.size), 0);
        ask(agent, meter, range, { to: 'private', notifies: false });
      },
      [Symbol.dispose]: () => kvm.close(),
    };
  },
};
