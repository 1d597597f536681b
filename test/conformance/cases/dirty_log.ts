import {
  KVM_CAP,
  KVM_MEM_LOG_DIRTY_PAGES,
  KVM_MEM_READONLY,
  KVM_VM_TYPE_ARM_PROTECTED,
  PROT_READ,
} from '../../../lib/uapi.ts';
import { mmioWrite } from '../guest.ts';
import { arm64, gmemSlots, logsWritesOnly, protectedVm, ringAcqRel, tdp, x86 } from '../needs.ts';
import { type Scenario, scenario, section } from '../scenario.ts';

const LOG = KVM_MEM_LOG_DIRTY_PAGES;
const MANUAL = KVM_CAP.MANUAL_DIRTY_LOG_PROTECT2;

/** A VM with one logged slot: with `mode` 3 (the cap's value), every bit starts set. */
const logged =
  (pages: number, mode = 0) =>
  (s: Scenario) => {
    const vm = s.vm();
    if (mode > 0) s.enable(vm, MANUAL, mode);
    if (s.slot(vm, { pages, flags: LOG }) !== 0) throw new Error('setup: no slot with a dirty log');
    return vm;
  };
const words = (...bits: number[]) => Uint8Array.from(bits);
const bitmap = (pages: number, byte = 0xff) => new Uint8Array(Math.ceil(pages / 64) * 8).fill(byte);
const ones = Array(8).fill(0xff);
const zeros = Array(8).fill(0);

/** A guest with 64 logged pages of host memory in slot 0; the host has written pages 0 to 7. */
const loggedGuest =
  ({ mode = 0, flags = LOG } = {}) =>
  (s: Scenario) => {
    const vm = s.vm();
    if (mode > 0) s.enable(vm, MANUAL, mode);
    const memory = s.anonymous(64);
    for (let page = 0; page < 8; page++) s.put(memory, page, 10 + page);
    const hva = s.kernel.addressOf(memory);
    if (s.slot(vm, { pages: 64, hva, flags }) !== 0) throw new Error('setup: no slot');
    return { vm, memory, hva, guest: s.guest(vm) };
  };
const ahead = (s: Scenario, page: number, pages: number) => ({
  gpa: BigInt(page * s.P),
  size: BigInt(pages * s.P),
  flags: 0,
});
/** The eight bytes of a log in which only these of the first eight pages are set. */
const pagesSet = (...pages: number[]) => [pages.reduce((byte, page) => byte | (1 << page), 0), ...zeros.slice(1)];

export const dirtyLog = section('Dirty log', [
  scenario(232, 'no slot, or a slot without LOG_DIRTY: ENOENT', {
    given: (s) => s.vm(),
    when: (s, vm) => [s.dirty(vm, 0), s.slot(vm), s.dirty(vm, 0), s.clearDirty(vm, 0, 0, 1), s.clearDirty(vm, 9, 0, 0)],
    expect: ['ENOENT', 0, 'ENOENT', 'ENOENT', 'ENOENT'],
  }),
  scenario('232 gmem', 'a slot with a guest_memfd has no dirty log', {
    needs: [gmemSlots],
    given: (s) => s.gmemVm(),
    when: (s, vm) => [s.bind(vm, { pages: 4, file: s.bindable(vm) }), s.dirty(vm, 0), s.clearDirty(vm, 0, 0, 4)],
    expect: [0, 'ENOENT', 'ENOENT'],
  }),
  scenario(233, 'x86: a slot id or address space out of range is EINVAL', {
    needs: [x86],
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.dirty(vm, 32764),
      s.dirty(vm, 2 << 16),
      s.dirty(vm, 32763),
      s.clearDirty(vm, 32764, 0, 0),
      s.clearDirty(vm, 2 << 16, 0, 0),
    ],
    expect: ['EINVAL', 'EINVAL', 'ENOENT', 'EINVAL', 'EINVAL'],
  }),
  scenario('233 arm64', 'arm64: a slot id or address space out of range is EINVAL', {
    needs: [arm64],
    given: (s) => s.vm(),
    when: (s, vm) => [s.dirty(vm, 32767), s.dirty(vm, 1 << 16), s.dirty(vm, 32766), s.clearDirty(vm, 32767, 0, 0)],
    expect: ['EINVAL', 'EINVAL', 'ENOENT', 'EINVAL'],
  }),
  scenario(234, 'a new log is empty', {
    given: logged(64),
    when: (s, vm) => s.dirty(vm, 0),
    expect: zeros,
  }),
  scenario('235 NULL', 'a NULL bitmap is EFAULT, after the slot is found', {
    given: logged(64),
    when: (s, vm) => [
      s.kernel.getDirtyLog(vm, { slot: 0, dirtyBitmap: null }),
      s.kernel.getDirtyLog(vm, { slot: 0, dirtyBitmap: new Uint8Array(7) }),
      s.kernel.getDirtyLog(vm, { slot: 5, dirtyBitmap: null }),
      s.kernel.getDirtyLog(vm, { slot: 40000, dirtyBitmap: null }),
    ],
    expect: ['EFAULT', 'EFAULT', 'ENOENT', 'EINVAL'],
  }),
  scenario('16 auto', 'in auto mode a GET takes the bits', {
    given: (s) => {
      const vm = logged(64, 3)(s);
      s.enable(vm, MANUAL, 0);
      return vm;
    },
    when: (s, vm) => [s.dirty(vm, 0), s.dirty(vm, 0)],
    expect: [ones, zeros],
  }),
  scenario('16 auto NULL', 'in auto mode a GET with a bad bitmap loses the bits', {
    given: (s) => {
      const vm = logged(64, 3)(s);
      s.enable(vm, MANUAL, 0);
      return vm;
    },
    when: (s, vm) => [s.kernel.getDirtyLog(vm, { slot: 0, dirtyBitmap: null }), s.dirty(vm, 0)],
    expect: ['EFAULT', zeros],
  }),
  scenario('16 manual NULL', 'in manual mode a GET with a bad bitmap loses nothing', {
    given: logged(64, 3),
    when: (s, vm) => [s.kernel.getDirtyLog(vm, { slot: 0, dirtyBitmap: null }), s.dirty(vm, 0)],
    expect: ['EFAULT', ones],
  }),
  scenario(236, 'CLEAR from a page that is no multiple of 64 is EINVAL before the slot is looked up', {
    given: logged(128),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 1, 0),
      s.clearDirty(vm, 9, 1, 0),
      s.clearDirty(vm, 9, 64, 0),
      s.clearDirty(vm, 0, 65, 63, bitmap(64)),
    ],
    expect: ['EINVAL', 'EINVAL', 'ENOENT', 'EINVAL'],
  }),
  scenario(237, 'CLEAR works without manual mode', {
    given: logged(64),
    when: (s, vm) => s.clearDirty(vm, 0, 0, 64, bitmap(64)),
    expect: 0,
  }),
  scenario(238, 'CLEAR of no pages succeeds with a NULL bitmap, also at the end', {
    given: logged(64),
    when: (s, vm) => [s.clearDirty(vm, 0, 0, 0), s.clearDirty(vm, 0, 64, 0)],
    expect: [0, 0],
  }),
  scenario(239, 'CLEAR of a 3-page slot takes 3 pages, not 2 and not 64', {
    given: logged(3),
    when: (s, vm) => [3, 2, 64].map((pages) => s.clearDirty(vm, 0, 0, pages, bitmap(64))),
    expect: [0, 'EINVAL', 'EINVAL'],
  }),
  scenario(240, 'CLEAR beyond the slot is EINVAL', {
    given: logged(64),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 128, 0),
      s.clearDirty(vm, 0, 64, 64, bitmap(64)),
      s.clearDirty(vm, 0, 0, 128, bitmap(128)),
      s.clearDirty(vm, 0, 1n << 63n, 0),
      s.clearDirty(vm, 0, -64, 64, bitmap(64)),
    ],
    expect: ['EINVAL', 'EINVAL', 'EINVAL', 'EINVAL', 'EINVAL'],
  }),
  scenario('16 CLEAR rest', 'CLEAR up to the end may be any number of pages', {
    given: logged(100, 3),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 64, 36, bitmap(36)),
      s.clearDirty(vm, 0, 0, 64, bitmap(64)),
      s.clearDirty(vm, 0, 0, 100, bitmap(100)),
      s.clearDirty(vm, 0, 0, 36, bitmap(36)),
    ],
    expect: [0, 0, 0, 'EINVAL'],
  }),
  scenario('16 CLEAR NULL', 'CLEAR with a NULL bitmap is EFAULT, after every other check', {
    given: logged(64),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 0, 64),
      s.clearDirty(vm, 0, 0, 2),
      s.clearDirty(vm, 9, 0, 64),
      s.clearDirty(vm, 0, 1, 64),
    ],
    expect: ['EFAULT', 'EINVAL', 'ENOENT', 'EINVAL'],
  }),
  scenario(241, 'INITIALLY_SET: a slot switched to LOG_DIRTY starts with all ones, and GET only reads', {
    given: (s) => {
      const vm = s.vm();
      s.enable(vm, MANUAL, 3);
      return vm;
    },
    when: (s, vm) => [s.slot(vm, { pages: 64 }), s.slot(vm, { pages: 64, flags: LOG }), s.dirty(vm, 0), s.dirty(vm, 0)],
    expect: [0, 0, ones, ones],
  }),
  scenario('241 created', 'INITIALLY_SET: a slot created with LOG_DIRTY starts with all ones too', {
    given: logged(64, 3),
    when: (s, vm) => [s.dirty(vm, 0), s.dirty(vm, 0)],
    expect: [ones, ones],
  }),
  scenario('241 padding', 'INITIALLY_SET: the padding past the last page stays 0', {
    given: logged(67, 3),
    when: (s, vm) => s.dirty(vm, 0, 16),
    expect: [...ones, 7, 0, 0, 0, 0, 0, 0, 0],
  }),
  scenario('241 manual only', 'manual mode without INITIALLY_SET starts empty', {
    given: logged(64, 1),
    when: (s, vm) => s.dirty(vm, 0),
    expect: zeros,
  }),
  scenario(242, 'CLEAR of the low 8 bits clears just those', {
    given: logged(64, 3),
    when: (s, vm) => [s.clearDirty(vm, 0, 0, 64, words(0xff, 0, 0, 0, 0, 0, 0, 0)), s.dirty(vm, 0)],
    expect: [0, [0, ...ones.slice(1)]],
  }),
  scenario('242 second word', 'CLEAR from page 64 on clears there', {
    given: logged(128, 3),
    when: (s, vm) => [s.clearDirty(vm, 0, 64, 64, words(0x0f, 0, 0, 0, 0, 0, 0, 0)), s.dirty(vm, 0, 16)],
    expect: [0, [...ones, 0xf0, ...ones.slice(1)]],
  }),
  scenario('16 CLEAR beyond', 'CLEAR ignores bits beyond the slot', {
    given: logged(3, 3),
    when: (s, vm) => [s.dirty(vm, 0), s.clearDirty(vm, 0, 0, 3, words(0xfd, 0xff, 0, 0, 0, 0, 0, 0)), s.dirty(vm, 0)],
    expect: [[7, 0, 0, 0, 0, 0, 0, 0], 0, [2, 0, 0, 0, 0, 0, 0, 0]],
  }),
  scenario('16 CLEAR auto', 'CLEAR in auto mode takes the bits it names', {
    given: (s) => {
      const vm = logged(64, 3)(s);
      s.enable(vm, MANUAL, 0);
      return vm;
    },
    when: (s, vm) => [s.clearDirty(vm, 0, 0, 64, words(1, 0, 0, 0, 0, 0, 0, 0)), s.dirty(vm, 0), s.dirty(vm, 0)],
    expect: [0, [0xfe, ...ones.slice(1)], zeros],
  }),
  scenario(243, 'dropping LOG_DIRTY frees the log', {
    given: logged(64, 3),
    when: (s, vm) => [s.slot(vm, { pages: 64 }), s.dirty(vm, 0)],
    expect: [0, 'ENOENT'],
  }),
  scenario('244 host', 'dropping and adding LOG_DIRTY loses what was pending', {
    given: logged(64, 3),
    when: (s, vm) => [
      s.enable(vm, MANUAL, 0),
      s.slot(vm, { pages: 64 }),
      s.slot(vm, { pages: 64, flags: LOG }),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, 0, zeros],
  }),
  scenario('10.2 move', 'moving a slot keeps its log', {
    given: logged(64, 3),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 0, 64, words(0xff, 0, 0, 0, 0, 0, 0, 0)),
      s.slot(vm, { pages: 64, at: 1024, flags: LOG }),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, [0, ...ones.slice(1)]],
  }),
  scenario('10.2 move and log', 'a move may turn the log on or off', {
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.slot(vm, { pages: 64 }),
      s.slot(vm, { pages: 64, at: 128, flags: LOG }),
      s.dirty(vm, 0),
      s.slot(vm, { pages: 64, at: 0 }),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, zeros, 0, 'ENOENT'],
  }),
  scenario('10.2 readonly', 'a read-only slot may be logged', {
    given: (s) => s.vm(),
    when: (s, vm) => [s.slot(vm, { pages: 64, flags: LOG | KVM_MEM_READONLY }), s.dirty(vm, 0)],
    expect: [0, zeros],
  }),
  scenario('16 repeat', 'repeating the request of a logged slot keeps its bits', {
    given: logged(64, 3),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 0, 64, words(0xff, 0, 0, 0, 0, 0, 0, 0)),
      s.slot(vm, { pages: 64, flags: LOG }),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, [0, ...ones.slice(1)]],
  }),
  scenario('16 recreate', 'deleting a slot and creating it again starts a new log', {
    given: logged(64, 3),
    when: (s, vm) => [
      s.clearDirty(vm, 0, 0, 64, bitmap(64)),
      s.remove(vm, 0),
      s.dirty(vm, 0),
      s.slot(vm, { pages: 64, flags: LOG }),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, 'ENOENT', 0, ones],
  }),
  scenario(248, 'what the host writes is not logged', {
    given: (s) => {
      const vm = s.vm();
      const memory = s.anonymous(64);
      return { vm, memory, hva: s.kernel.addressOf(memory) };
    },
    when: (s, { vm, memory, hva }) => [
      s.slot(vm, { pages: 64, hva, flags: LOG }),
      s.put(memory, 3, 1),
      s.get(memory, 3),
      s.dirty(vm, 0),
    ],
    expect: [0, 1, 1, zeros],
  }),
  scenario('16 ring', 'a dirty ring without a bitmap: ENXIO, even for a slot that cannot be', {
    needs: [ringAcqRel],
    given: (s) => s.vm(),
    when: (s, vm) => [
      s.enable(vm, KVM_CAP.DIRTY_LOG_RING_ACQ_REL, 1 << 16),
      s.slot(vm, { pages: 64, flags: LOG }),
      s.dirty(vm, 0),
      s.dirty(vm, 40000),
      s.dirty(vm, 9),
      s.clearDirty(vm, 0, 0, 64, bitmap(64)),
      s.clearDirty(vm, 0, 1, 0),
    ],
    expect: [0, 0, 'ENXIO', 'ENXIO', 'ENXIO', 'ENXIO', 'ENXIO'],
  }),
  scenario('17.1 dirty log', 'a protected VM has no dirty log', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [s.slot(vm), s.dirty(vm, 0), s.clearDirty(vm, 0, 0, 1)],
    expect: [0, 'ENOENT', 'ENOENT'],
  }),
]);

export const guestDirtyLog = section('Dirty log of a guest', [
  scenario('16 write', 'what the guest writes is logged, each time after the log was taken', {
    given: loggedGuest(),
    when: (s, { vm, guest }) => [
      guest.put(3, 1),
      guest.put(5, 1),
      s.dirty(vm, 0),
      s.dirty(vm, 0),
      guest.put(3, 2),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, pagesSet(3, 5), zeros, 0, pagesSet(3)],
  }),
  scenario(235, 'in auto mode a GET with a NULL bitmap loses what the guest wrote', {
    given: loggedGuest(),
    when: (s, { vm, guest }) => [
      guest.put(3, 1),
      s.kernel.getDirtyLog(vm, { slot: 0, dirtyBitmap: null }),
      s.dirty(vm, 0),
      guest.put(3, 2),
      s.dirty(vm, 0),
    ],
    expect: [0, 'EFAULT', zeros, 0, pagesSet(3)],
  }),
  scenario('16 manual', 'in manual mode the log stays until a CLEAR, after which the next write is logged', {
    given: loggedGuest({ mode: 1 }),
    when: (s, { vm, guest }) => [
      guest.put(3, 1),
      guest.put(5, 1),
      s.dirty(vm, 0),
      s.dirty(vm, 0),
      s.clearDirty(vm, 0, 0, 64, words(1 << 3, 0, 0, 0, 0, 0, 0, 0)),
      s.dirty(vm, 0),
      guest.put(3, 2),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, pagesSet(3, 5), pagesSet(3, 5), 0, pagesSet(5), 0, pagesSet(3, 5)],
  }),
  scenario('16 initially set', 'INITIALLY_SET: a write after a CLEAR is logged', {
    given: loggedGuest({ mode: 3 }),
    when: (s, { vm, guest }) => [s.clearDirty(vm, 0, 0, 64, bitmap(64)), guest.put(3, 1), s.dirty(vm, 0)],
    expect: [0, 0, pagesSet(3)],
  }),
  scenario(244, 'dropping and adding LOG_DIRTY loses what the guest wrote', {
    given: loggedGuest(),
    when: (s, { vm, hva, guest }) => [
      guest.put(3, 1),
      s.slot(vm, { pages: 64, hva }),
      s.slot(vm, { pages: 64, hva, flags: LOG }),
      s.dirty(vm, 0),
      guest.put(3, 2),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, 0, zeros, 0, pagesSet(3)],
  }),
  scenario('16 enabled later', 'a log that starts when the guest has the pages already starts empty', {
    given: loggedGuest({ flags: 0 }),
    when: (s, { vm, hva, guest }) => [
      guest.put(3, 1),
      s.slot(vm, { pages: 64, hva, flags: LOG }),
      s.dirty(vm, 0),
      guest.put(3, 2),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, zeros, 0, pagesSet(3)],
  }),
  scenario('248 guest', 'what the host writes under a guest that has the page is not logged', {
    given: loggedGuest(),
    when: (s, { vm, memory, guest }) => [
      guest.put(3, 1),
      s.dirty(vm, 0),
      s.put(memory, 3, 2),
      guest.get(3),
      s.dirty(vm, 0),
    ],
    expect: [0, pagesSet(3), 1, 2, zeros],
  }),
  scenario('16 read-only write', 'a write to a read-only slot is not logged', {
    given: loggedGuest({ flags: LOG | KVM_MEM_READONLY }),
    when: (s, { vm, guest }) => [guest.get(4), guest.put(3, 1), guest.again(), s.dirty(vm, 0)],
    expect: [14, mmioWrite(3, 1), 0, zeros],
  }),
  scenario(245, 'with TDP, a first read of a page that the host has written counts as a write', {
    needs: [tdp],
    given: loggedGuest(),
    when: (s, { vm, guest }) => [
      guest.get(3),
      s.dirty(vm, 0),
      guest.get(3),
      s.dirty(vm, 0),
      guest.put(3, 1),
      s.dirty(vm, 0),
    ],
    expect: [13, pagesSet(3), 13, zeros, 0, pagesSet(3)],
  }),
  scenario('16 untouched read', 'with TDP, a first read of a page that nobody has written does not', {
    needs: [tdp],
    given: loggedGuest(),
    when: (s, { vm, guest }) => [guest.get(20), s.dirty(vm, 0), guest.put(20, 1), s.dirty(vm, 0)],
    expect: [0, zeros, 0, [0, 0, 1 << 4, 0, 0, 0, 0, 0]],
  }),
  scenario('16 read', 'without TDP, and on arm64, reads are not logged', {
    needs: [logsWritesOnly],
    given: loggedGuest(),
    when: (s, { vm, guest }) => [guest.get(3), guest.get(20), s.dirty(vm, 0)],
    expect: [13, 0, zeros],
  }),
  scenario(247, 'with TDP, a page that is mapped ahead counts as written if the host’s page is there', {
    needs: [tdp],
    given: loggedGuest(),
    when: (s, { vm, guest }) => [s.kernel.preFaultMemory(guest.vcpu, ahead(s, 6, 4)), s.dirty(vm, 0)],
    expect: [0, pagesSet(6, 7)],
  }),
  scenario('247 PROT_READ', 'with TDP, a page that is mapped ahead is not logged if the host may only read it', {
    needs: [tdp],
    given: loggedGuest(),
    when: (s, { vm, memory, guest }) => [
      s.kernel.mprotect(memory, 0, 64 * s.P, PROT_READ),
      s.kernel.preFaultMemory(guest.vcpu, ahead(s, 6, 4)),
      s.dirty(vm, 0),
    ],
    expect: [0, 0, zeros],
  }),
]);
