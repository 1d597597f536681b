// What a conversion costs beside a large guest: by the pieces it touches, whatever else there is.
import { Kvm, type Vm } from '../lib/index.ts';
import { quantile, type Row } from './measure.ts';

const PAGE = 4096;
const SLOTS = 1000;
/** Every other page of a slot is private: a thousand ranges in each. */
const SLOT_SIZE = 2000 * PAGE;
const TOUCHED = { slots: 4, size: 16 * PAGE };
const ROUNDS = 41;
const CALLS = 100;

/** The rest, `times` as large, and behind it a few small slots that are converted. */
function guest(times: number): { kvm: Kvm; cycle: () => void } {
  const kvm = Kvm.open({ backend: 'software' });
  const vm = kvm.createVm({ type: 'sw-protected' });
  const rest = times * SLOTS * SLOT_SIZE;
  const size = rest + TOUCHED.slots * TOUCHED.size;
  const [hostMemory, guestMemfd] = [kvm.createHostMemory({ size }), vm.createGuestMemfd({ size })];
  const slot = (address: number, size: number) =>
    vm.createMemslot({ address, size, hostMemory, hostOffset: address, guestMemfd, guestMemfdOffset: address });
  for (let address = 0; address < rest; address += SLOT_SIZE) slot(address, SLOT_SIZE);
  for (let address = rest; address < size; address += TOUCHED.size) slot(address, TOUCHED.size);
  const device = vm.addMemoryUser({ name: 'device' });
  for (let address = 0; address < rest; address += 2 * PAGE) {
    vm.setMemoryAttributes({ address, size: PAGE }, { private: true });
    if (address % SLOT_SIZE === 0) device.hold({ address, size: PAGE });
  }
  return { kvm, cycle: () => backAndForth(vm, rest, size - rest) };
}

function backAndForth(vm: Vm, address: number, size: number): void {
  for (const to of ['private', 'shared'] as const)
    if (vm.convertSync({ address, size }, to).changed.length !== 1) throw new Error('it must change');
}

export function benchPlanning(): Row[] {
  const guests = [guest(1), guest(2)];
  const times: number[][] = [[], []];
  // In turns, so that both have the same weather.
  for (let round = 0; round < ROUNDS; round++) {
    for (const [index, { cycle }] of guests.entries()) {
      const start = performance.now();
      for (let call = 0; call < CALLS; call++) cycle();
      if (round > 5) times[index]?.push((performance.now() - start) / CALLS / 2);
    }
  }
  for (const { kvm } of guests) kvm.close();
  const [once = 0, twice = 0] = times.map((each) => quantile(each, 0.5) * 1000);
  return [
    { name: `convert 256 KiB over 4 of 1 004 slots, beside 1 000 000 ranges`, value: once, unit: 'µs' },
    { name: 'the same, the rest doubled', value: twice, unit: 'µs' },
    { name: 'how much doubling the rest adds', value: (twice / once - 1) * 100, unit: '%', bar: 10 },
  ];
}
