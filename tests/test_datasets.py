"Published layouts in miniature, one's own tables, and the rules by which they are scored"
import io, os, re
import numpy as np, pytest, torch
from PIL import Image
from fastai.vision.all import *
from scipy.io import savemat
from dmlfast.all import *
from dmlfast.data.datasets import crop_tfms
from dmlfast.train.export import split_hash

def jpeg(c=0, size=(12,9)):
    "A small JPEG, of a colour for each class"
    im = Image.fromarray(np.uint8(np.ones((size[1],size[0],1))*[c*53%256, c*97%256, c*31%256]))
    im.save(f := io.BytesIO(), 'jpeg')
    return f.getvalue()

def put(path, what):
    "Write text, lines or bytes, and the folders they need"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(what, list): what = '\n'.join(map(str, what))
    path.write_bytes(what if isinstance(what, bytes) else what.encode())

def write_cub(path, classes=range(1,201), n=2):
    names = {c:f'{c:03}.Bird_{c}' for c in classes}
    images = [(c,f'{names[c]}/Bird_{c}_{i:04}.jpg') for c in classes for i in range(n)]
    for c,o in images: put(path/'CUB_200_2011'/'images'/o, jpeg(c))
    put(path/'CUB_200_2011'/'images.txt', [f'{i} {o}' for i,(_,o) in enumerate(images, 1)])
    put(path/'CUB_200_2011'/'image_class_labels.txt', [f'{i} {c}' for i,(c,_) in enumerate(images, 1)])
    put(path/'CUB_200_2011'/'classes.txt', [f'{c} {o}' for c,o in names.items()])
    return path

def annos(rows, field):
    a = np.zeros(len(rows), dtype=[(field,'O'),('class','O'),('bbox_x1','O')])
    for i,(o,c) in enumerate(rows): a[i] = o,c,7
    return a

CARS = np.array([f'Car {200-c}' for c in range(1,197)], dtype=object) # sorted by name is not sorted by id

def write_cars(path, folders):
    rows = [(i,c) for i,c in enumerate(np.repeat(range(1,197), 2), 1)]
    if not folders:
        for i,c in rows: put(path/'car_ims'/f'{i:06}.jpg', jpeg(c))
        savemat(path/'cars_annos.mat', dict(annotations=annos([(f'car_ims/{i:06}.jpg',c) for i,c in rows], 'relative_im_path'),
            class_names=CARS))
        return path
    (path/'devkit').mkdir(parents=True)
    savemat(path/'devkit'/'cars_meta.mat', dict(class_names=CARS))
    for part,at,fn in [('cars_train', slice(0,None,2), 'devkit/cars_train_annos.mat'),
        ('cars_test', slice(1,None,2), 'cars_test_annos_withlabels.mat')]:
        half = [(f'{i:05}.jpg',c) for i,(_,c) in enumerate(rows[at], 1)]
        for o,c in half: put(path/part/o, jpeg(c))
        savemat(path/fn, dict(annotations=annos(half, 'fname')))
    return path

def write_sop(path, n_classes=10, n=3):
    lines = {'train':[],'test':[]}
    for i in range(2*n_classes*n):
        c,kind = i//n+1,'bicycle' if i<n_classes*n else 'sofa'
        put(path/f'{kind}_final'/f'{i}_0.JPG', jpeg(c))
        lines['train' if c<=n_classes else 'test'].append(f'{i+1} {c} {1+(kind=="sofa")} {kind}_final/{i}_0.JPG')
    for k,v in lines.items(): put(path/f'Ebay_{k}.txt', ['image_id class_id super_class_id path'] + v)
    return path

def inshop_rows(n_classes=8):
    for c in range(1, n_classes+1):
        for i,s in enumerate(['train']*4 if c<=n_classes//2 else ['query','query','gallery','gallery']):
            yield f'img/WOMEN/Dresses/id_{c:08}/{i:02}_1_front.jpg',f'id_{c:08}',s

def write_inshop(path, sub=True):
    rows = list(inshop_rows())
    for c,(o,*_) in enumerate(rows): put(path/('Img' if sub else '.')/o, jpeg(c//4*5+c%2))
    put(path/('Eval' if sub else '.')/'list_eval_partition.txt', [len(rows), 'image_name item_id evaluation_status']
        + [f'{a:70}{b} {s}' for a,b,s in rows])
    return path

def write_vehicles(path, n=4):
    # of these medium does not hold small
    lists = dict(train_list=range(1,11), test_list_800=range(11,13), test_list_1600=range(13,17), test_list_2400=range(11,17))
    for c in range(1,17):
        for i in range(n): put(path/'image'/f'{c*n+i:07}.jpg', jpeg(c*3+i))
    for k,v in lists.items(): put(path/'train_test_split'/f'{k}.txt', [f'{c*n+i:07} {c}' for c in v for i in range(n)])
    return path

readers = dict(cub=(write_cub, cub200), cars=(partial(write_cars, folders=False), cars196),
    cars2=(partial(write_cars, folders=True), cars196),
    sop=(write_sop, online_products), inshop=(write_inshop, inshop), vehicle=(write_vehicles, vehicle_id))

@pytest.fixture
def read(tmp_path):
    "Function that writes a miniature, changes it, and reads it"
    def _read(name, change=None, **kwargs):
        write,reader = readers[name]
        write(tmp_path/name)
        if change: change(tmp_path/name)
        return reader(tmp_path/name, **kwargs)
    return _read

@pytest.mark.parametrize('name,classes,images', [('cub',[50,50,100],[100,100,200]), ('cars',[49,49,98],[98,98,196]),
    ('cars2',[49,49,98],[98,98,196]),
    ('sop',[8,2,10],[24,6,30]), ('inshop',[3,1,4],[12,4,16]), ('vehicle',[8,2,6,2,4,6],[32,8,24,8,16,24])])
def test_official_layouts(read, name, classes, images):
    ds = read(name)
    assert ds.summary().classes.tolist()==classes and ds.summary().images.tolist()==images
    dls = ds.dataloaders(bs=4, per_class=2, size=16, num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(4,3,16,16) and y[0]==y[1]!=y[2]==y[3]
    assert dls.n_train_classes==classes[0] and len(dls.valid_ds)==images[1]
    assert len(ds.dataloaders(bs=4, per_class=2, valid='test', size=16, num_workers=0).valid_ds)==images[2]

def test_which_classes(read):
    cub = read('cub')
    at = cub.df.groupby('label').split.first()
    assert [at[f'{c:03}.Bird_{c}'] for c in (1,50,51,100,101,200)]==['train','train','val','val','test','test']
    assert cub.df.path[0]=='images/001.Bird_1/Bird_1_0000.jpg' and cub.items()[0].is_file()
    one,two = read('cars').df,read('cars2').df
    at = one.groupby('label').split.first()
    assert [at[f'Car {200-c}'] for c in (1,49,50,98,99,196)]==['train','train','val','val','test','test']
    assert (two.groupby('label').split.first()==at).all() and (two.label.value_counts()==one.label.value_counts()).all()
    assert one.path[0]=='car_ims/000001.jpg' and set(two.path.str.split('/').str[0])=={'cars_train','cars_test'}
    sop = read('sop', seed=None).df
    assert sop.groupby('split').label.agg(['min','max']).loc[['train','val','test']].values.tolist()==[[1,8],[9,10],[11,20]]
    assert sop.category.tolist()==['bicycle']*30+['sofa']*30

def test_a_mirror_of_cars(tmp_path):
    write_cars(tmp_path, True)
    for o in ('cars_train','cars_test'):
        (tmp_path/o).rename(tmp_path/'x')
        (tmp_path/'x').rename((tmp_path/o).mkdir() or tmp_path/o/o)
    assert cars196(tmp_path).df.path[0]=='cars_train/cars_train/00001.jpg'

def test_inshop_without_folders(tmp_path): assert inshop(write_inshop(tmp_path, sub=False)).df.path[0].startswith('img/WOMEN')

def change(fn, f):
    "What makes a fault in a list: a function of its lines"
    def _f(path):
        lines = (path/fn).read_text().split('\n')
        put(path/fn, f(lines) or lines)
    return _f

def remove(fn): return lambda path: (path/fn).unlink()
C = 'CUB_200_2011/'
faults = dict(
    cub=[(remove(C+'images.txt'), "CUB-200-2011: there is no 'images.txt'"), (remove(C+'classes.txt'), "There is no list '.*classes.txt'"),
        (remove(C+'images/003.Bird_3/Bird_3_0001.jpg'),
        r"1 of 400 images are not in '.*CUB_200_2011': 'images/003.Bird_3/Bird_3_0001.jpg'"),
        (change(C+'images.txt', lambda l: l[:6]+['7 008 Bird/a.jpg']+l[7:]), r"images.txt', line 7: expected 'image_id image_name', got "
        r"'7 008 Bird/a.jpg'"),
        (change(C+'image_class_labels.txt', lambda l: l[:3]+['4 two']+l[4:]), r"image_class_labels.txt', line 4: expected 'image_id "
        r"class_id', got '4 two'"),
        (change(C+'image_class_labels.txt', lambda l: l[:-2]), r"image_class_labels.txt' has no line for 399, 400 of '.*images.txt'"),
        (change(C+'classes.txt', lambda l: l[:-1]), r"classes.txt' has no line for 200 of"),
        (change(C+'images.txt', lambda l: l[:-1]+['1 x.jpg']), r"1 of 400 images are not in"),
        (change(C+'image_class_labels.txt', lambda l: l+['1 7']), "has 1 lines for something that has a line already"),
        (change(C+'images.txt', lambda l: l[:1]+['2 '+l[0].split()[1]]+l[2:]), "1 images are in the table twice: "
        "'images/001.Bird_1/Bird_1_0000.jpg'"),
        (change(C+'images.txt', lambda l: ['']), "The list '.*images.txt' is empty")],
    cars=[(remove('cars_annos.mat'), "There is no file '.*cars_annos.mat'"), (remove('car_ims/000007.jpg'), "Cars-196: 1 of 392 images "
    "are not in '.*': 'car_ims/000007.jpg'"),
        (lambda p: put(p/'cars_annos.mat', b'no matlab file at all'*20), r"cars_annos.mat' cannot be read \("),
        (lambda p: savemat(p/'cars_annos.mat', dict(annotations=annos([('car_ims/000001.jpg',1), ('car_ims/000002.jpg',197)],
        'relative_im_path'), class_names=CARS)),
            "cars_annos.mat', annotation 2: class 197 is not between 1 and 196"),
        (lambda p: savemat(p/'cars_annos.mat', dict(annotations=annos([('car_ims/000001.jpg',1)]*2, 'relative_im_path'),
        class_names=CARS)), "1 images are in the table twice"),
        (lambda p: savemat(p/'cars_annos.mat', dict(class_names=CARS)), "has no variable 'annotations'")],
    cars2=[(remove('cars_test_annos_withlabels.mat'), "Cars-196: there is no 'cars_test_annos_withlabels.mat' in"),
    (remove('devkit/cars_meta.mat'), "there is no 'cars_meta.mat'"),
        (lambda p: savemat(p/'cars_test_annos_withlabels.mat', dict(annotations=np.zeros(1, dtype=[('fname','O')]))),
        "annotations without 'class': those of the test images are in")],
    sop=[(remove('Ebay_test.txt'), "There is no list '.*Ebay_test.txt'"), (remove('Ebay_train.txt'), "Stanford Online Products: there is "
    "no 'Ebay_train.txt'"),
        (change('Ebay_train.txt', lambda l: l[:4]+['4 2 1']+l[5:]), "Ebay_train.txt', line 5: expected 'image_id class_id super_class_id "
        "path', got '4 2 1'"),
        (change('Ebay_test.txt', lambda l: l[1:]), "Ebay_test.txt', line 1: expected 'image_id class_id super_class_id path', got '31 11 "
        "2 sofa_final/30_0.JPG'"),
        (change('Ebay_test.txt', lambda l: [o.replace(' 11 ', ' 10 ') for o in l]), "1 classes are in two splits: 10"),
        (change('Ebay_test.txt', lambda l: l+[l[-1]]), "1 images are in the table twice: 'sofa_final/59_0.JPG'"),
        (remove('sofa_final/59_0.JPG'), "Stanford Online Products: 1 of 60 images are not in")],
    inshop=[(remove('Eval/list_eval_partition.txt'), "In-Shop: there is no 'Eval/list_eval_partition.txt' or 'list_eval_partition.txt'"),
        (change('Eval/list_eval_partition.txt', lambda l: l[:-1]), "line 1: it should say how many images follow, which are 31, and says "
        "'32'"),
        (change('Eval/list_eval_partition.txt', lambda l: l[:-1]+[l[-1].replace('gallery','galery')]),
        "list_eval_partition.txt', line 34: expected 'image_name item_id evaluation_status', got 'img"),
        (change('Eval/list_eval_partition.txt', lambda l: [o.replace('id_00000005 ', 'id_00000004 ') for o in l]),
        "1 classes are in two splits: 'id_00000004'"),
        (change('Eval/list_eval_partition.txt', lambda l: [o.replace('gallery','query') for o in l]),
        "All 16 images of the split 'test' of In-Shop are query: there is no gallery"),
        (remove('Img/img/WOMEN/Dresses/id_00000001/00_1_front.jpg'), "In-Shop: 1 of 32 images are not in '.*': 'Img/img")],
    vehicle=[(remove('train_test_split/test_list_1600.txt'), "There is no list '.*test_list_1600.txt'"),
        (change('train_test_split/train_list.txt', lambda l: l[:1]+['0000005']+l[2:]),
        "train_list.txt', line 2: expected 'image vehicle', got '0000005'"),
        (change('train_test_split/train_list.txt', lambda l: l+['0000044 11']), "1 images are in the table twice: 'image/0000044.jpg'"),
        (change('train_test_split/test_list_800.txt', lambda l: l[:-1]+['0000051 3']),
        "1 images are in the table twice: 'image/0000051.jpg'"),
        (change('train_test_split/test_list_2400.txt', lambda l: l+['0000999 10']), "1 classes are in two splits: 10"),
        (remove('image/0000051.jpg'), "VehicleID: 1 of 64 images are not in")])

@pytest.mark.parametrize('name,fault,said', [(k,*o) for k,v in faults.items() for o in v])
def test_faults_of_a_download(read, name, fault, said):
    with pytest.raises(ValueError, match=said): read(name, fault)

def test_files_need_not_be_looked_for(read):
    assert len(read('sop', remove('sofa_final/59_0.JPG'), check_files=False))==60

def test_no_folder(tmp_path):
    for _,reader in readers.values():
        with pytest.raises(ValueError, match="There is no folder '.*nowhere'"): reader(tmp_path/'nowhere')
        with pytest.raises(ValueError, match='Is this its official download, unpacked'): reader(tmp_path)

@pytest.fixture
def odd(tmp_path):
    "A name that is no UTF-8, where the disk takes one"
    name = os.fsdecode(b'caf\xe9')
    try: (tmp_path/name).mkdir()
    except OSError: pytest.skip('this disk has only UTF-8 names')
    return name

def test_names_that_are_no_utf8(odd, tmp_path, tmp_path_factory):
    "Such names are read, found, shown and told apart"
    for c in (odd, os.fsdecode(b'caf\xe8'), 'café', 'tea'):
        for i in range(3): put(tmp_path/c/f'{i}.jpg', jpeg(i))
    ds = MetricDataset.from_folder(tmp_path, test_pct=.25, val_pct=0)
    assert sorted(set(ds.df.label))==['caf\\xe8','caf\\xe9','café','tea']
    for o in (repr(ds), ds._repr_html_(), ds.df.label.to_csv()): o.encode()
    dls = ds.dataloaders(bs=6, per_class=2, valid='test', size=16, num_workers=0)
    assert dls.one_batch()[0].shape==(6,3,16,16)
    dls.show_batch()
    learn = metric_learner(dls, 'test_resnet', emb_sz=8, pretrained=False, path=tmp_path)
    finder = learn.export_embedder(tmp_path_factory.mktemp('finder'), gallery='test')
    assert finder.items==[str(o.relative_to(tmp_path)) for o in ds.items('test')]
    assert split_hash(dls)!=split_hash(
        MetricDataset.from_folder(tmp_path, test_pct=.5, val_pct=0).dataloaders(bs=4, per_class=2, valid='test', size=16, num_workers=0))
    rows = [b'path,label'] + [f'{c}/{i}.jpg,{c}'.encode('utf-8', 'surrogateescape') for c in (odd,'tea') for i in range(3)]
    put(tmp_path/'own.csv', b'\n'.join(rows))
    own = MetricDataset.from_csv(tmp_path/'own.csv')
    assert set(own.df.label)=={'caf\\xe9','tea'} and all(o.is_file() for o in own.items())
    put(tmp_path/'own.csv', b'\n'.join(rows+[b'caf\xe9/9.jpg,tea']))
    with pytest.raises(ValueError, match=r"1 of 7 images are not in '.*': 'caf\\udce9/9.jpg'"): MetricDataset.from_csv(tmp_path/'own.csv')

def test_list_with_a_name_that_is_no_utf8(odd, tmp_path):
    write_cub(tmp_path/'cub', classes=[1,2,101,102])
    home = tmp_path/'cub'/'CUB_200_2011'
    (home/'images'/'001.Bird_1').rename(home/'images'/odd)
    for o in ('images.txt','classes.txt'): (home/o).write_bytes((home/o).read_bytes().replace(b'001.Bird_1', b'caf\xe9'))
    ds = cub200(tmp_path/'cub')
    assert ds.df.label[0]=='caf\\xe9' and ds.items()[0].is_file()

table = pd.DataFrame(dict(path=[f'{c}{i}.jpg' for c in 'abcdef' for i in range(4)], label=np.repeat(list('abcdef'), 4),
    split=['train']*8+['val']*8+['test']*8))

@pytest.mark.parametrize('change,said', [
    (dict(path=['./b0.jpg' if o=='a0.jpg' else o for o in table.path]), "1 images are in the table twice: 'b0.jpg'"),
    (dict(path=[5,*table.path[1:]]), r"names files, and holds 5: `columns=dict"), (dict(path=[5,*table.path[1:]], label=None), 'no label'),
    (dict(label=[None]+list(table.label[1:])), 'have no label; the first is row 0'),
    (dict(split=[*table.split[:-1],'']), 'have no split; the first is row 23'),
    (dict(split=[*table.split[:-1],'val']), "1 classes are in two splits: 'f'"), (dict(split=['valid']*24), "Unknown split 'valid'"),
    (dict(role=['querry']*24), "Unknown role 'querry'"), (dict(part=['False']*24), "The subset 'part' is a column of true and false; it "
    "holds 'False'"), (dict(role=['gallery']*24), "All 8 images of the split 'test' of images are gallery: there is no query")])
def test_faults_of_a_table(change, said):
    with pytest.raises(ValueError, match=said):
        MetricDataset(table.assign(**change), check_files=False, subsets=[o for o in change if o=='part'])

def test_faults_of_a_table_that_is_written_by_hand(tmp_path):
    "What is missing, without the split that is optional; labels with a blank behind them; a file of another encoding"
    with pytest.raises(ValueError, match="no column 'path', 'label'; it"):
        MetricDataset.from_df(table.rename(columns=dict(path='a', label='b')).drop(columns='split'))
    with pytest.warns(UserWarning, match="differ by blanks alone: 'a'"):
        MetricDataset.from_df(table.drop(columns='split').assign(label=['a ']*2+[*table.label[2:]]), check_files=False)
    table.to_csv(tmp_path/'t.csv', index=False, encoding='utf-16')
    with pytest.raises(ValueError, match="is not in utf-8-sig: try `encoding='utf-16'`"): MetricDataset.from_csv(tmp_path/'t.csv')
    assert len(MetricDataset.from_csv(tmp_path/'t.csv', encoding='utf-16', check_files=False))==24

def test_subsets_of_a_file(tmp_path):
    "A file is all text, so its true and false are words"
    table.assign(part=['True','false']*12).to_csv(tmp_path/'t.csv', index=False)
    for kwargs in (dict(subsets=['part']), dict(subsets=['some'], columns=dict(some='part'))):
        assert len(MetricDataset.from_csv(tmp_path/'t.csv', check_files=False, **kwargs).items(kwargs['subsets'][0]))==12
    table.assign(part=['True','no']*12).to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(ValueError, match="'part' is a column of true and false"):
        MetricDataset.from_csv(tmp_path/'t.csv', check_files=False, subsets=['part'])

def test_a_subset_that_cuts_through_classes(tmp_path):
    "What is not marked of a class that is held out is neither trained on nor measured"
    for o in table.path: put(tmp_path/o, jpeg())
    ds = MetricDataset(table.assign(hard=[o in ('c0.jpg','c1.jpg','e2.jpg') for o in table.path]), tmp_path, subsets=['hard'])
    seen,held = ds._held_out('hard')
    assert set(ds.df.label[seen])=={'a','b','d'} and ds.df.path[held].tolist()==['c0.jpg','c1.jpg','e2.jpg']
    with pytest.warns(UserWarning, match='Batches have 12 images'): dls = ds.dataloaders(valid='hard', size=8, num_workers=0)
    assert dls.n_train_classes==3 and sorted(o.name for o in dls.valid.items)==['c0.jpg','c1.jpg','e2.jpg']
    assert {o.name[0] for o in dls.train.items}==set('abd')
    with pytest.raises(ValueError, match='per_class=0'): ds.dataloaders(valid='hard', size=8, num_workers=0, per_class=0)

def test_columns_that_trade_names():
    ds = MetricDataset.from_df(table.rename(columns=dict(label='category')).assign(label='x'), '.',
        columns=dict(label='category', category='label'), check_files=False)
    assert ds.df.label.tolist()==table.label.tolist() and set(ds.df.category)=={'x'}

def test_tables_in_files(tmp_path):
    head = 'path,label,split,camera\n'
    rows = [f'{s}{len(c)}{i}.jpg,{c},{s},{i}' for c,s in [('007','train'),('7','train'),('NA','test'),('"a, b"','test')] for i in range(2)]
    def _read(text, **kwargs):
        put(tmp_path/'t.csv', text)
        return MetricDataset.from_csv(tmp_path/'t.csv', check_files=False, **kwargs)
    ds = _read('\ufeff' + head + '\n'.join(rows) + '\n\n', columns=dict(sequence='camera'))
    assert ds.df.label.tolist()[::2]==['007','7','NA','a, b'] and ds.df.sequence.tolist()==['0','1']*4
    tabs = _read((head+'\n'.join(rows[:6])).replace(',', '\t').replace('\n', '\r\n'), sep='\t')
    assert tabs.df.label.tolist()[::2]==['007','7','NA'] and tabs.path==tmp_path
    for text,said in [('', 'has no line with the names'), (head+'\n'.join(rows[:3]+['x.jpg,x']), r"t.csv', line 5: 2 fields where the "
        r"first line has 4 \('x.jpg', 'x'\)"),
            (head+'\n'.join(rows[:3]+['x.jpg,"x']), r"t.csv', line 5: unexpected end of data"), (head, 'images|has no images'),
            (head+'x.jpg,,train,1', 'have no label; the first is row 0'), (head.replace('label','kind')+rows[0], "no column 'label'")]:
        with pytest.raises(ValueError, match=said): _read(text)
    with pytest.raises(ValueError, match="There is no file '.*nowhere.csv'"): MetricDataset.from_csv(tmp_path/'nowhere.csv')

def test_one_image_is_reported():
    with pytest.warns(UserWarning, match="2 of 6 classes of images have one image only: 'a', 'e'."):
        ds = MetricDataset(table.drop(index=[0,1,2,17,18,19]), check_files=False)
    assert ds.summary().singles.tolist()==[1,0,1]

def test_test_classes_are_only_seen_by_name(few):
    "Whatever is asked for but `'test'`, no test image is trained on or measured on"
    test = set(few.items('test'))
    for ds in (few, *few.folds(3)):
        for valid in ('val', None):
            dls = ds.dataloaders(bs=8, per_class=2, valid=valid, num_workers=0)
            assert not test & set(dls.train_ds.items) and not test & set(dls.valid_ds.items)
        dls = ds.dataloaders(bs=8, per_class=2, valid='test', num_workers=0)
        assert set(dls.valid_ds.items)==test and len(dls.train_ds)==len(few)-len(test)
    assert few.dataloaders(bs=8, per_class=2, num_workers=0).valid_ds.items
    with pytest.raises(ValueError, match="`valid` is 'val', 'test' or None; got 'tests'"): few.dataloaders(valid='tests')

def test_folds(few):
    known = set(few.df.label[few.df.split!='test'])
    for seed in (0, None):
        folds = few.folds(4, seed=seed)
        vals = [set(o.df.label[o.df.split=='val']) for o in folds]
        assert sorted(c for o in vals for c in o)==sorted(known) and max(map(len, vals))-min(map(len, vals))<=1
        for o,val in zip(folds, vals): assert set(o.df.label[o.df.split=='train'])==known-val
    assert vals[0]==set(sorted(known)[:len(vals[0])])
    assert 'val' in set(few.df.split) and folds[0].name=='few glyphs, fold 1 of 4'
    with pytest.raises(ValueError, match='between 2 and the'): few.folds(1)

def test_crops_keep_proportions(tmp_path):
    "The image to measure on is PIL's: shorter side to 256, middle 224"
    x,y = np.meshgrid(np.linspace(0, 255, 500), np.linspace(0, 255, 333))
    im = Image.fromarray(np.uint8(np.stack([x, y, (x+y)/2], 2)))
    got = np.asarray(Pipeline([PILImage.create, *crop_tfms(224)], split_idx=1)(np.asarray(im)), dtype=float)
    ref = im.resize((round(500*256/333), 256), Image.Resampling.BILINEAR)
    left = (ref.size[0]-224)//2
    ref = np.asarray(ref.crop((left, 16, left+224, 240)), dtype=float)
    assert got.shape==(224,224,3) and np.abs(got-ref).max()<=2
    tall = np.asarray(im.transpose(Image.Transpose.ROTATE_90))
    assert Pipeline([PILImage.create, *crop_tfms(96)], split_idx=1)(tall).size==(96,96)
    seen = {Pipeline([PILImage.create, *crop_tfms(32)], split_idx=0)(np.asarray(im)).tobytes() for _ in range(5)}
    assert len(seen)==5

def test_statistics_of_the_model(few):
    "Whatever mean and scale a body was trained with: here those of the Caffe models, on 0 to 1"
    mean,std = [128/255,117/255,104/255],[1/255]*3
    model = Embedder('test_resnet', 8, pretrained=False)
    model.body.pretrained_cfg = {**model.body.pretrained_cfg, 'mean':tuple(mean), 'std':tuple(std)}
    dls = few.dataloaders(bs=8, per_class=2, num_workers=0)
    im = np.asarray(PILImage.create(dls.valid_ds.items[0]), dtype=np.float32)
    metric_learner(dls, model, TripletLoss())
    x = dls.valid.one_batch()[0][0].cpu()
    assert torch.allclose(x, torch.tensor(im).permute(2,0,1)-torch.tensor([128.,117.,104.])[:,None,None], atol=1e-2)

def learner(ds, tmp_path, valid, **kwargs):
    set_seed(0)
    dls = ds.dataloaders(bs=8, per_class=4, valid=valid, seed=0, size=16, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=8, pretrained=False, path=tmp_path, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn

def first_hits(embs, labels, queries, gallery, unseen=lambda i,j: i==j):
    "Recall@1 as it is defined, a query at a time"
    hits = []
    for i in queries:
        js = [j for j in gallery if not unseen(i,j)]
        if any(labels[j]==labels[i] for j in js): hits.append(labels[max(js, key=lambda j: float(embs[i]@embs[j]))]==labels[i])
    return float(np.mean(hits))

def test_queries_search_the_gallery(read, tmp_path):
    "In-Shop: `evaluate`, the columns of a fit, and the definition agree, and a plain evaluation does not have that many queries"
    ds = read('inshop', val_pct=0.25)
    learn = learner(ds, tmp_path, 'test')
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names[3:-1])==['recall@1','recall@10','recall@20','recall@30','recall@40','recall@50','map@r']
    embs,y = learn.embed('test')
    role = ds.df.role[ds.df.split=='test'].tolist()
    qs,gs = ([i for i,o in enumerate(role) if o==r] for r in ('query','gallery'))
    res = learn.evaluate('test')
    assert len(res.labels)==8 and res.settings['n_gallery']==8
    assert res['recall@1']==first_hits(embs, y.tolist(), qs, gs)==pytest.approx(learn.recorder.values[-1][2])
    assert res['recall@10']==1 and {'nmi','recall@50'}<=set(res.keys())
    assert len(learn.evaluate('val').labels)==(ds.df.split=='val').sum()
    assert len(learn.evaluate('test', role=None).labels)==16
    assert len(learn.evaluate('test', gallery=embs[:3], gallery_labels=y[:3], self_exclude=False).labels)==16

def test_galleries_are_drawn(read, tmp_path):
    "VehicleID: ten galleries of one image of each vehicle, for each of the three lists"
    learn = learner(read('vehicle'), tmp_path, 'test_small')
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names[3:-1])==['recall@1','recall@5','map@r'] and len(learn.dls.valid_ds)==8
    for name,n in dict(test_small=2, test_medium=4, test_large=6, test=6, val=2).items():
        res = learn.evaluate(name)
        assert (len(res.labels),res.settings['n_gallery'],res.settings['repeats'])==(10*n*3,n,10)
    assert learn.evaluate()['recall@1']==pytest.approx(learn.recorder.values[-1][2])
    with pytest.raises(ValueError, match="has no split 'small'; its splits are train, val, test, test_small"): learn.evaluate('small')

def test_sequences_do_not_see_themselves(few, tmp_path):
    "Images of a class that were taken together do not find each other; those of another class are in the way all the same"
    df = few.df.assign(sequence=np.where(few.df.index%5==0, '', 'one take'))
    ds = MetricDataset(df, few.path, size=None, flip=False)
    dls = ds.dataloaders(bs=8, per_class=4, seed=0, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=8, pretrained=False, path=tmp_path)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    learn.fit(1, 1e-3)
    embs,y = learn.embed('val')
    y,seq = y.tolist(),df.sequence[df.split=='val'].tolist()
    unseen = lambda i,j: i==j or (y[i]==y[j] and seq[i]==seq[j]!='')
    at = range(len(y))
    assert learn.evaluate('val')['recall@1']==first_hits(embs, y, at, at, unseen)==pytest.approx(learn.recorder.values[-1][2])
    assert learn.evaluate('val', ignore=None)['recall@1']==first_hits(embs, y, at, at)!=learn.evaluate('val')['recall@1']

def test_training_without_validation(few, tmp_path):
    dls = few.dataloaders(bs=8, per_class=4, valid=None, num_workers=0)
    learn = metric_learner(dls, 'test_resnet', TripletLoss(), emb_sz=8, pretrained=False, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert np.isnan(learn.recorder.values[-1][2])
    assert len(learn.evaluate('test').labels)==len(few.items('test'))
    with pytest.raises(ValueError, match='no items'): learn.evaluate()

def test_columns_of_products(read, tmp_path):
    "recall@1000 on fewer images than that"
    learn = learner(read('sop'), tmp_path, 'test')
    learn.fit(1, 1e-3)
    assert list(learn.recorder.metric_names[3:-1])==['recall@1','recall@10','recall@100','recall@1000','map@r']
    assert learn.recorder.values[-1][5]==1

def test_a_row_for_each_class(few):
    import matplotlib.pyplot as plt
    dls = few.dataloaders(bs=24, per_class=6, seed=0, num_workers=0)
    y = dls.one_batch()[1]
    for max_n,rows in ((None,4), (9,2)):
        plt.close('all')
        dls.show_batch(max_n=max_n)
        axs = plt.gcf().axes
        assert len(axs)==rows*6 and sum(bool(o.images) for o in axs)==(max_n or 24)
        assert [o.get_title(loc='left') for o in axs]==[dls.vocab[y[i]] if i%6==0 else '' for i in range(rows*6)]
    dls.show_batch(max_n=4, nrows=1)
    assert len(plt.gcf().axes)==4
    dls.valid.show_batch(max_n=4)
    plt.close('all')

def test_roles_and_what_is_not_seen():
    "Queries, gallery and both, with ids that hide each other: against the definition, a query at a time"
    rng = np.random.default_rng(0)
    embs = torch.nn.functional.normalize(torch.tensor(rng.normal(size=(60,4)), dtype=torch.float32), dim=1)
    y,ids,role = rng.integers(0, 4, 60).tolist(),rng.integers(0, 3, 60).tolist(),rng.choice(['query','gallery',''], 60).tolist()
    qs,gs = ([i for i,o in enumerate(role) if o!=r] for r in ('gallery','query'))
    values = set()
    for ignore,unseen in ((None, lambda i,j: i==j), (ids, lambda i,j: i==j or ids[i]==ids[j])):
        res = evaluate_protocol(embs, y, role=role, ignore=ignore, metrics=['recall@1'])
        assert res['recall@1']==first_hits(embs, y, qs, gs, unseen) and len(res.labels)==len(qs)
        values.add(res['recall@1'])
    assert len(values)==2
    with pytest.raises(ValueError, match='one word for each of 60 items'): evaluate_protocol(embs, y, role=role[1:])
    with pytest.raises(ValueError, match="not 'both'"): evaluate_protocol(embs, y, role=['both']*60)

def test_names_that_are_html(few):
    "A notebook shows them and does not obey them"
    ds = MetricDataset(few.df.assign(**{'<b>part':few.df.split=='test'}), few.path, '<b>x&', subsets=['<b>part'])
    assert '&lt;b&gt;x&amp;: ' in ds._repr_html_() and '&lt;b&gt;part' in ds._repr_html_() and '<b>' not in ds._repr_html_()
    r = RetrievalResult({'<b>':np.ones(3)}, [0,0,1])
    r.why_no_interval = lambda name: '<b>no'
    for o in (r, r-r): assert '&lt;b&gt;' in o._repr_html_() and '<b>' not in o._repr_html_()
    assert '&lt;b&gt;no' in r._repr_html_()
    recipes['<b>'] = Recipe('<b>', ours='<b>')
    try: assert recipes._repr_html_().count('&lt;b&gt;')==3 and '<b>' not in recipes._repr_html_()
    finally: del recipes['<b>']

def test_transforms_have_two_names(few):
    for o in ('tfms','transforms'):
        with pytest.raises(TypeError, match=f"no argument of `dataloaders` '{o}'.*`item_tfms=`.*`batch_tfms=`"): few.dataloaders(**{o:None})

def test_all_splits_have_a_name(few):
    assert few.items('all')==few.items() and len(few.items('all'))==len(few.df)
